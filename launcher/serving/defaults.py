"""What stands in for functions that the user did not write: models of PyTorch and of scikit-learn.

A pickle may run any code when it is loaded. A model is the user's own, but it comes from a bucket: so pickles are only
loaded when the server was told to (``--allow-pickle``), and PyTorch's weights without their objects.
"""

from __future__ import annotations

import os
import sys

from launcher.errors import ContractError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_TORCH = (".pt", ".pth", ".pt2", ".safetensors")
_PICKLED = (".joblib", ".pkl", ".pickle")
# The first of these is taken where a model has several files, as the reference's PyTorch container does.
_PREFERRED = ("model.pt", "model.pth", "model.pt2", "model.safetensors", "model.joblib", "model.pkl")


def load_model(model_dir: str, gpu: int | None, allow_pickle: bool, create: Callable[[], Any] | None) -> Any:
    """The default ``model_fn``.

    Args:
        gpu: the device; None for the CPU.
        create: makes the network that weights are loaded into; None: the user wrote no ``create_model``.

    Raises:
        ContractError: there is no file, or more than one, that this knows how to load; or what it needs is missing.
    """
    path = _model_file(model_dir)
    if path.endswith(_TORCH):
        return _load_torch(path, gpu, create)
    if not allow_pickle:
        raise ContractError(
            path,
            "",
            "a pickled model, which may run any code when it is loaded",
            "a model_fn, or --allow-pickle (LAUNCHER_SERVE_ALLOW_PICKLE=1) where its source is trusted",
        )
    joblib = _needed("joblib", path)
    return joblib.load(path)


def predict(data: Any, model: Any) -> Any:
    """The default ``predict_fn``: the network or the estimator, called with ``data``.

    Raises:
        ContractError: ``model`` is neither.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        if not isinstance(data, torch.Tensor):
            data = torch.as_tensor(data, dtype=None if parameter is None else parameter.dtype)
        with torch.inference_mode():
            return model(data.to(device))
    if hasattr(model, "predict"):
        return model.predict(data)
    if callable(model):
        return model(data)
    raise ContractError(
        "predict_fn",
        "",
        f"none, and a model of type {type(model).__name__}, which cannot be called",
        "Please provide a predict_fn implementation.",
    )


def _model_file(model_dir: str) -> str:
    try:
        names = sorted(os.listdir(model_dir))
    except OSError as error:
        raise ContractError(
            model_dir, "", f"no directory of a model ({error.strerror})", "what training left"
        ) from None
    for name in _PREFERRED:
        if name in names:
            return os.path.join(model_dir, name)
    known = [name for name in names if name.endswith((*_TORCH, *_PICKLED))]
    if len(known) == 1:
        return os.path.join(model_dir, known[0])
    found = ", ".join((known or names)[:8]) or "nothing"
    raise ContractError(
        model_dir,
        "",
        f"{found}: {'more than one model' if known else 'no model that can be loaded without code'}",
        "Please provide a model_fn implementation, or one file "
        f"named {', '.join('*' + suffix for suffix in (*_TORCH, *_PICKLED))}",
    )


def _load_torch(path: str, gpu: int | None, create: Callable[[], Any] | None) -> Any:
    torch = _needed("torch", path)
    device = torch.device("cpu" if gpu is None else f"cuda:{gpu}")
    if path.endswith(".pt2"):
        return torch.export.load(path).module().to(device)
    if create is None and not path.endswith(".safetensors") and _is_torch_script(torch, path):
        return torch.jit.load(path, map_location=device).eval()
    if create is None:
        raise ContractError(
            path,
            "",
            "weights without a network",
            "create_model(model_dir) in the code, which makes the network that they are loaded into, or a model_fn",
        )
    network = create()
    if path.endswith(".safetensors"):
        _needed("safetensors", path)
        from safetensors.torch import load_file

        weights = load_file(path, device=str(device))
    else:
        weights = torch.load(path, map_location=device, weights_only=True)
    network.load_state_dict(weights)
    return network.to(device).eval()


def _is_torch_script(torch: Any, path: str) -> bool:
    """TorchScript and torch.save() both write zip archives; only the first has constants of its code in it."""
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _needed(name: str, path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ContractError(
            path, "", f"a model that needs {name}, which is not installed", f"pip install {name}"
        ) from error
