"""A matrix: the defaults turn JSON into an array and the answer into JSON."""

import os

import numpy as np


def model_fn(model_dir):
    return np.load(os.path.join(model_dir, "W.npy"))


def predict_fn(data, model):
    return data @ model
