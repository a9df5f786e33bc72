"""The subcommand ``watch``."""

from __future__ import annotations

import argparse
import signal
import time
from threading import Event

import torch

from ..plugin import register
from ..preparation import SETTING_UP
from ..watching import FolderWatch
from .loading import load_for_inspection
from .printing import say

_TOLD_EVERY = 10.0  # seconds


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Watch a folder until a signal comes; the code is 1 where that was asked for and not every image is good."""
    if not 0.0 < given.interval < 1e6:
        parser.error(f"--interval must be seconds above 0, got {given.interval}.")
    register()
    model = load_for_inspection(given.ckpt_path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with SETTING_UP:
        model.make_ready("predict", is_named=True)
    options = {"keep": given.keep, "min_area": given.min_area, "batch_size": given.batch_size}
    watch = FolderWatch(model, given.folder, given.out, given.class_name, patience=given.patience, **options)
    stop = Event()
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: stop.set())
    say(f"Watching {given.folder}; results: {given.out}")
    told, counted = time.monotonic(), 0
    with watch.lock:
        while not stop.is_set():
            waits = watch.look(stop.is_set)
            total = sum(watch.counts.decisions.values())
            if total > counted and time.monotonic() - told >= _TOLD_EVERY:
                say(str(watch.counts))
                told, counted = time.monotonic(), total
            if given.once and not waits:
                break
            stop.wait(given.interval)
    say(f"Stopped. {watch.counts}")
    return int(given.fail_on_anomaly and bool(set(watch.counts.decisions) - {"good"}))
