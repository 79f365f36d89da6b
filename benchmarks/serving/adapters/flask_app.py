"""A container of one's own, as many are: Flask below gunicorn, the model loaded when a worker imports this."""

import json
import os

import tasks
from flask import Flask, Response, request

app = Flask(__name__)
task = tasks.load(os.environ["SERVING_MODEL_DIR"])


@app.get("/ping")
def ping() -> Response:
    """Alive, and since the model is loaded by now, ready."""
    return Response(status=200)


@app.post("/invocations")
def invocations() -> Response:
    """JSON in, JSON out."""
    return Response(json.dumps(task(request.get_json())), mimetype="application/json")
