"""A section's child for tests of whoever watches it: it does what its facts tell it, and needs no PyTorch.

python scripted_section.py NAME --seconds S --facts '{"plays": {"NAME": [["item", "raise"], ...]}}' --pipe FD
"""

import argparse
import json
import os
import signal
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--seconds", type=float)
parser.add_argument("--dtype")
parser.add_argument("--avoid", nargs="*", default=[])
parser.add_argument("--finished", nargs="*", default=[])
parser.add_argument("--facts", type=json.loads)
parser.add_argument("--pipe", type=int)
args = parser.parse_args()


def say(**message):
    os.write(args.pipe, json.dumps(message).encode() + b"\n")


for what, act in args.facts["plays"].get(args.name, [["item", "row"]]):
    if act == "gone":
        say(lost="found no GPU: none is there", gone=True)
        sys.exit(1)
    if what in args.finished:
        continue
    if what in args.avoid:
        say(row={"what": what, "skipped": "it ended a process before"})
        continue
    say(begin=what)
    if act == "hang":
        time.sleep(600)
    elif act == "stubborn":  # SIGTERM does not end it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    elif act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "crash":
        sys.exit(3)
    elif act == "lost":
        say(lost=f"lost its GPU at {what}: an illegal memory access was encountered", gone=False)
        sys.exit(1)
    elif act == "slow":
        for _ in range(40):
            say(alive=True)
            time.sleep(0.1)
    say(compiled=1, hits=2)
    print("what a library prints")
    say(row={"what": what, "copy_gb_s": 3000.0, "seen": args.facts.get("copy_gb_s")})
    say(end=what)
say(done=True)
