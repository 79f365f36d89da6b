# A serving image: `docker run -p 8080:8080 -v MODEL:/opt/ml/model IMAGE serve`. Built in the root of the checkout:
#
#   docker build -f docker/serve.Dockerfile -t launcher-serve .
#
# BASE_IMAGE and BUILD_IMAGE are explained in train.Dockerfile; the stage that builds is the same.
ARG BASE_IMAGE=docker.io/library/python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
USER root
WORKDIR /src
ENV PIP_CONSTRAINT=/src/docker/constraints.txt PIP_BUILD_CONSTRAINT=/src/docker/constraints.txt PIP_NO_CACHE_DIR=1
COPY docker/ensure-python docker/constraints.txt docker/
RUN docker/ensure-python --to-build
COPY . .
RUN python -m pip wheel --wheel-dir /wheels '.[serve]'

FROM ${BASE_IMAGE} AS base
USER root
COPY docker/ensure-python /tmp/
RUN /tmp/ensure-python && rm /tmp/ensure-python

FROM base AS install
COPY --from=build /wheels /wheels
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python -m pip install --no-index --find-links /wheels --root /layer 'launcher[serve]'

FROM build AS strip
COPY --from=install /layer /layer
RUN find /layer -name '*.so' -exec strip --strip-unneeded {} + && install -d -m 1777 /layer/opt/ml

FROM base
COPY --from=strip /layer /
# The platform asks these before it gives a container many models, or a port other than 8080.
LABEL com.amazonaws.sagemaker.capabilities.multi-models=true \
      com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
EXPOSE 8080
# The port of SAGEMAKER_BIND_TO_PORT or LAUNCHER_SERVE_PORT; a model may take minutes to load. Podman: --format docker.
HEALTHCHECK --interval=10s --timeout=6s --start-period=600s --retries=3 CMD ["python", "-m", "launcher", "serve", "--check"]
ENTRYPOINT ["python", "-m", "launcher"]
CMD ["serve"]
