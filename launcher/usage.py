"""The text of ``--help``, from the table of launcher.options."""

from __future__ import annotations

from launcher.options import OPTIONS


def usage() -> str:
    """The text of ``--help``."""
    lines = [
        "usage: python -m launcher [options] SCRIPT [script arguments]",
        "       python -m launcher train [options]      the program named by the container contract",
        "       python -m launcher plan [--json] [options] [SCRIPT ...]   show every decision, run nothing",
        "                                                        (without a script: what train would do)",
        "       python -m launcher simulate --hosts N [--dir DIR] [options] SCRIPT ...   N hosts on this one",
        "       python -m launcher bench collectives [--nproc N] [--sizes 1K,64K,25M] [--output FILE] [--json]",
        "                                                        what allreduce gives on this machine, with a chart",
        "       python -m launcher serve [options]      the model in /opt/ml/model, over HTTP (serve --help: more)",
        "       python -m launcher transform --input DIR --output DIR [options]   a batch-transform job, here",
        "       python -m launcher data inspect|index|verify|convert CHANNEL_OR_PATH [options]   (data --help: more)",
        "                                                        what records a channel has, whether they are whole",
        "",
        "Starts and supervises every rank of a training job on this host, and says in one line what went wrong.",
        "Options before the script are the launcher's, after it the script's. Each can also be set as",
        "LAUNCHER_<NAME> in the environment or <name>: in launcher.yaml.",
    ]
    group = ""
    for option in OPTIONS:
        if option.group != group:
            group = option.group
            lines += ["", f"{group}:"]
        names = ", ".join(
            (*(alias for alias in option.aliases if len(alias) == 2), "--" + option.name.replace("_", "-"))
        )
        value = option.metavar or ("{" + ",".join(option.choices) + "}" if option.choices else "")
        if option.kind == "mode":
            value = "[=" + "|".join(option.choices) + "]"
        default = f" [{option.default}]" if option.kind != "flag" and option.default not in ("", None, {}) else ""
        head = f"  {names}{'' if option.kind == 'mode' else ' '}{value}".rstrip()
        lines.append(
            f"{head:<32} {option.help}{default}" if len(head) < 32 else f"{head}\n{'':<32} {option.help}{default}"
        )
    lines += ["", "torchrun's other options are accepted and have no effect."]
    return "\n".join(lines)
