"""Nothing to load, nothing to compute, and no NumPy in the way: what is left is the server's own start."""

import json


def model_fn(model_dir):
    return None


def input_fn(body, content_type):
    return json.loads(body)


def predict_fn(data, model):
    return [len(data)]


def output_fn(prediction, accept):
    return json.dumps(prediction)
