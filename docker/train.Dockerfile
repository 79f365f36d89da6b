# A training image: `docker run IMAGE train`. Build it in the root of the checkout:
#   docker build -f docker/train.Dockerfile --build-arg BASE_IMAGE=python:3.11-slim-bookworm -t launcher-train .
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${BASE_IMAGE}
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && rm -rf /wheels
# Exec form, so that signals arrive, and no shell: the platform appends the word `train`.
ENTRYPOINT ["python", "-m", "launcher"]
