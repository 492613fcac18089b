"""A fresh process that loads once with one peer: imports, a warm-up with a small file, "ready"; at a line on standard input
it loads, times itself, and only then proves what it got. Runs in the peers' environment and imports nothing of the project.

    python worker.py MODULE convert OUT FILE...
    python worker.py MODULE load SMALL,SMALL... FILE...
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path


def main():
    sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print
    name, verb, argument, *files = sys.argv[1:]
    try:
        module = importlib.import_module(name)
        if verb == "convert":
            module.convert(files, argument)
            answers.write("{}\n")
            return
        module.load(argument.split(","))
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    answers.write("ready\n")
    sys.stdin.readline()
    began, cpu_began = time.perf_counter(), cpu_s()
    tensors = module.load(files)
    if getattr(module, "LAZY", False):
        for tensor in tensors.values():
            bytes_of(tensor)[::4096].max()
    seconds, used_s = time.perf_counter() - began, cpu_s() - cpu_began
    check = total = 0
    for tensor in tensors.values():
        data = bytes_of(tensor)
        total += data.nbytes
        check += int(data.view("<u8").sum())
    answers.write(
        json.dumps({"seconds": seconds, "cpu_s": used_s, "bytes": total, "tensors": len(tensors), "check": check % 2**64})
        + "\n"
    )
    answers.flush()
    os._exit(0)  # some libraries take seconds to end


def bytes_of(tensor):
    import torch  # after the peer: it may want to be imported first

    return tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()


def cpu_s():
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


if __name__ == "__main__":
    main()
