"""TorchServe's handler: a list of requests in, a list of answers out."""

import json
import os

import tasks


class Handler:
    """What TorchServe asks of a class."""

    def initialize(self, context):
        self.task = tasks.load(os.environ["SERVING_MODEL_DIR"])

    def handle(self, requests, context):
        context.set_all_response_status(200, "OK")
        for index in range(len(requests)):
            context.set_response_content_type(index, "application/json")
        return [json.dumps(self.task(self._values(request))) for request in requests]

    @staticmethod
    def _values(request):
        body = request.get("body", request.get("data"))  # parsed already, when the content type says JSON
        return json.loads(body) if isinstance(body, (str, bytes, bytearray)) else body
