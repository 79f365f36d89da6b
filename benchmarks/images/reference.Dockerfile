# The reference: sagemaker-training on the same base, as its own README says to build an image. Its wheels are made in
# another stage, so that the compiler that they need is not counted against it.
ARG BASE_IMAGE
FROM ${BASE_IMAGE} AS build
COPY docker/ensure-python /tmp/
RUN /tmp/ensure-python --to-build && apt-get -qq update && apt-get -qq install -y --no-install-recommends make
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python -m pip install --no-cache-dir --root /layer sagemaker-training==5.1.1

FROM ${BASE_IMAGE}
COPY docker/ensure-python /tmp/
RUN /tmp/ensure-python && rm /tmp/ensure-python
COPY --from=build /layer /
ENV SAGEMAKER_PROGRAM=train.py
ENTRYPOINT ["train"]
