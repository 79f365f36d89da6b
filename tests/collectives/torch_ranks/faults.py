"""What a rank sees of another one's end. Run on two ranks; the second one dies."""

import datetime
import json
import os
import signal
import time

import torch
import torch.distributed as dist

from launcher.collectives.torch_backend import CollectiveBackendError


def failure(call: object) -> dict[str, object]:
    begin = time.monotonic()
    try:
        call()
    except (RuntimeError, CollectiveBackendError) as error:
        return {
            "type": type(error).__name__,
            "torch": isinstance(error, dist.DistBackendError),
            "text": str(error),
            "reason": getattr(error, "reason", None),
            "rank": getattr(error, "rank", None),
            "seconds": time.monotonic() - begin,
        }
    return {}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, when rank 1 is dead: rank 0 tells what it saw first
    torch.set_num_threads(1)
    dist.init_process_group("launcher", timeout=datetime.timedelta(seconds=60))
    store = dist.distributed_c10d._get_default_store()
    seen = {}
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(5), async_op=True)
        seen["late"] = failure(lambda: work.wait(datetime.timedelta(milliseconds=50)))
        store.set("go", "on")
        work.wait()
    else:
        store.wait(["go"])
        dist.all_reduce(torch.ones(5))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(200, 200))
    model(torch.ones(1, 200)).sum().backward()
    loss = model(torch.ones(1, 200)).sum()
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    seen["backward"] = failure(loss.backward)
    seen["synchronous"] = failure(lambda: dist.all_reduce(torch.ones(3)))
    seen["asynchronous"] = failure(lambda: dist.all_reduce(torch.ones(3), async_op=True).wait())
    with open("seen", "w") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main()
