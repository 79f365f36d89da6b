"""A model that takes two seconds to load, and notes when it was there."""

import json
import os
import time


def model_fn(model_dir):
    time.sleep(2)
    with open(os.environ["SERVING_LOADED"], "a") as file:
        file.write(f"{time.monotonic_ns()}\n")
    return None


def input_fn(body, content_type):
    return json.loads(body)


def predict_fn(data, model):
    return [len(data)]


def output_fn(prediction, accept):
    return json.dumps(prediction)
