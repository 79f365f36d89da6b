"""LitServe, at SageMaker's paths."""

import os
import sys

import litserve
import tasks


class Api(litserve.LitAPI):
    """The four methods that LitServe asks for."""

    def setup(self, device):
        self.task = tasks.load(os.environ["SERVING_MODEL_DIR"])

    def decode_request(self, request):
        return request

    def predict(self, values):
        return self.task(values)

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(api_path="/invocations"),
        healthcheck_path="/ping",
        accelerator="cpu",
        devices=1,
        workers_per_device=int(sys.argv[2]),
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
