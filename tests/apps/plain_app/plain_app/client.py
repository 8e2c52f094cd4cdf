"""A client that counts its calls in context.state, and misbehaves when its message says so."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.lifespan()
def lifespan(context: Context):
    context.state.config_records.setdefault("lives", ConfigRecord({"begun": 0}))
    yield


def count(context: Context) -> int:
    """How often this node was called, this call included."""
    calls = int(context.state["calls"]["count"]) + 1 if "calls" in context.state else 1
    context.state["calls"] = MetricRecord({"count": calls})
    return calls


def misbehave(config: ConfigRecord) -> None:
    """What the message says: `raise`, `hang`, or be killed (`die`: always; else once, if the file does not exist)."""
    do = config.get("do", "")
    if do == "print and raise":
        print("seen by nobody")
        raise ValueError("as told")
    if do == "raise":
        raise ValueError("as told\nin two lines")
    if do == "hang":
        time.sleep(60)
    if do == "die" or (do and do.startswith("/") and not Path(do).exists()):
        if do != "die":
            Path(do).touch()
        os.kill(os.getpid(), signal.SIGKILL)


@app.train()
def train(message: Message, context: Context) -> Message:
    calls = count(context)
    misbehave(message.content["config"])
    arrays = message.content["arrays"].to_numpy_ndarrays()
    for array in arrays:
        array += context.node_config["partition-id"]  # writable
    metrics = MetricRecord({"num-examples": 1, "calls": calls, "pid": os.getpid()})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 1, "mean": float(arrays[0].mean()), "calls": count(context)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    config = ConfigRecord({**context.node_config, "mode": context.run_config["mode"], "calls": count(context)})
    return Message(RecordDict({"who": config}), reply_to=message)


@app.query("echo")
def echo(message: Message, context: Context) -> Message:
    """The content as it came; and, where asked, what `data` looks like to who takes it for bytes."""
    if "looked-at" in message.content:
        data = next(iter(message.content["arrays"].values())).data
        message.content["looked-at"] = ConfigRecord({"hash": hash(data), "size": len(data), "start": data[:6]})
    return Message(message.content, reply_to=message)


@app.query("memory")
def memory(message: Message, context: Context) -> Message:
    """Keep the message's array, if it has one, in the state; answer with what the state held before."""
    before = dict(context.state)
    if "arrays" in message.content:
        context.state["arrays"] = message.content["arrays"]
    return Message(RecordDict({key: value for key, value in before.items() if key == "arrays"}), reply_to=message)


@app.query("wrong")
def wrong(message: Message, context: Context) -> Message:
    return "no message"  # type: ignore[return-value]


@app.query("library")
def library(message: Message, context: Context) -> Message:
    return context.run_config["mode"]  # replaced below: no line of the app is in the traceback


app._registered_funcs["query.library"] = np.linalg.inv


@app.query("slow")
def slow(message: Message, context: Context) -> Message:
    time.sleep(float(message.content["config"]["seconds"]))
    return Message(RecordDict({"calls": MetricRecord({"count": count(context)})}), reply_to=message)
