# A training image: `docker run IMAGE train`. Built in the root of the checkout:
#
#   docker build -f docker/train.Dockerfile -t launcher-train .
#
# BASE_IMAGE is what training needs: a slim Python, a CUDA runtime, a deep-learning image. With a base of Debian or Ubuntu
# that has no Python, the distribution's is installed. BUILD_IMAGE compiles, and does not ship; where it has an nvcc, the
# CUDA library is built too. Its Python must be the base's, its glibc not newer:
#
#   --build-arg BUILD_IMAGE=nvidia/cuda:12.8.1-devel-ubuntu22.04 --build-arg BASE_IMAGE=nvidia/cuda:12.8.1-runtime-ubuntu22.04
ARG BASE_IMAGE=docker.io/library/python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
USER root
WORKDIR /src
# Versions of all that is downloaded. Two names, since pip took the second for builds only from 25.3 on.
ENV PIP_CONSTRAINT=/src/docker/constraints.txt PIP_BUILD_CONSTRAINT=/src/docker/constraints.txt PIP_NO_CACHE_DIR=1
COPY docker/ensure-python docker/constraints.txt docker/
RUN docker/ensure-python --to-build
COPY . .
RUN python -m pip wheel --wheel-dir /wheels '.[serve]'

FROM ${BASE_IMAGE} AS base
# As the platform starts it; another user: `--user`, or USER in an image on top.
USER root
COPY docker/ensure-python /tmp/
RUN /tmp/ensure-python && rm /tmp/ensure-python

FROM base AS install
COPY --from=build /wheels /wheels
# Only what is missing: packages of a deep-learning image stay as they are.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python -m pip install --no-index --find-links /wheels --root /layer launcher

FROM build AS strip
COPY --from=install /layer /layer
# 1777: also a user who is not root can make a job's directories where no platform has mounted them.
RUN find /layer -name '*.so' -exec strip --strip-unneeded {} + && install -d -m 1777 /layer/opt/ml

FROM base
# One layer, without the compiler, the wheels and the traces of pip.
COPY --from=strip /layer /
# Exec form, so that signals reach process 1 and the platform's word, `train`, becomes its argument.
ENTRYPOINT ["python", "-m", "launcher"]
CMD ["train"]
