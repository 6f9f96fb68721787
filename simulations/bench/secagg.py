"""What secure aggregation costs: one hospital's work, the coordinator's, bytes and memory.

Beside it, in the same run: the AES-256-CTR keystreams alone, by OpenSSL's plain CTR (one for each
peer, one for the hospital itself; vector AES can be faster, see ``common.secagg.masks``), and
Flower's SecAgg+ from float update to upload with its own functions, without its key agreement.
Noise is timed apart: Flower's has none.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from common.identity import Identity
from common.randomness import SecretNoise
from common.secagg import (
    AggregationPolicy,
    ClientSession,
    Kind,
    MemoryAttempts,
    ServerSession,
    Terms,
)
from common.secagg.encoding import Encoding

PARAMETERS = 10**7
_REPEATS = 3
_PIECE_BYTES = 2**17
_FLOWER_RANGE = 2**32


def secagg(data_folder: Path, parameters: int = PARAMETERS) -> dict[str, Any]:
    """Seconds for 10⁷ parameters on one core; ``data_folder`` is not used.

    ``client_s_*``: one hospital's whole work in a round with so many peers: clipping and rounding
    a float32 update, keys, shares, masks, hash and signatures.
    ``server_unmask_s``, ``server_unmask_dropout_s``: 11 hospitals, none or one of them gone.
    ``encode_s``: the clipping and rounding in it. ``noise_s``: Skellam noise, on top.
    """
    del data_folder
    figures: dict[str, Any] = {"parameters": parameters}
    for peers in (10, 100):
        figures[f"keystream_s_{peers}"] = _best(partial(_keystreams, peers + 1, parameters))
        figures[f"flower_s_{peers}"] = _best(
            partial(_flower, peers + 1, parameters), repeats=_REPEATS if peers == 10 else 1
        )
    ten = [_whole_round(11, parameters, gone=gone) for gone in (0, 1)]
    figures["client_s_10"] = min(one["client_s"] for one in ten)
    figures["client_s_100"] = min(_one_client(101, parameters, 101) for _ in range(_REPEATS))
    figures["client_s_100_sparse"] = _one_client(101, parameters, 32)
    figures["server_unmask_s"] = ten[0]["unmask_s"]
    figures["server_unmask_dropout_s"] = ten[1]["unmask_s"]
    figures["bytes_per_parameter"] = ten[0]["bytes"] / parameters
    figures |= _encoding(parameters)
    figures["peak_vector_copies"] = _peak_copies(parameters)
    figures["over_keystream_10"] = figures["client_s_10"] / figures["keystream_s_10"]
    figures["faster_than_flower_10"] = figures["flower_s_10"] / figures["client_s_10"]
    return figures


class _World:
    """Hospitals of which the first is measured."""

    def __init__(self, size: int, parameters: int, complete_up_to: int, threshold: int) -> None:
        names = [f"hospital {one:03d}" for one in range(size)]
        self.identities = {name: Identity.generate() for name in names}
        pinned = {name: identity.public for name, identity in self.identities.items()}
        self.terms = Terms(
            run="bench", stage="bench", round=0, step=0, attempt=0, model=bytes(32),
            plan=bytes(32), hospitals=size, threshold=threshold, colluders=min(5, size // 10),
            length=parameters, input_bound=(2**31 - 1) // size, complete_up_to=complete_up_to,
        )  # fmt: skip
        self.encoding = Encoding.fitting(
            length=parameters, clip_norm=1.0, units=1, hospitals=size, threshold=threshold,
            colluders=0, noise_multiplier=0.0,
        )  # fmt: skip
        self.server = ServerSession(terms=self.terms, pinned=pinned)
        self.clients = {
            name: ClientSession(
                name=name, identity=identity, terms=self.terms, policy=AggregationPolicy(),
                pinned=pinned, attempts=MemoryAttempts(),
            )
            for name, identity in self.identities.items()
        }  # fmt: skip
        self.seconds = dict.fromkeys(names, 0.0)
        self.bytes = dict.fromkeys(names, 0)

    def timed(self, name: str, call: Callable[[], bytes]) -> bytes:
        start = time.perf_counter()
        reply = call()
        self.seconds[name] += time.perf_counter() - start
        self.bytes[name] += len(reply)
        return reply

    def advertise(self) -> dict[str, bytes]:
        for name, client in self.clients.items():
            self.server.receive(self.timed(name, client.advertise))
        return self.server.advance()

    def answer(self, name: str, message: bytes) -> bytes:
        client = self.clients[name]
        if client.expects is not Kind.DELIVERY:
            return self.timed(name, partial(client.answer, message))
        update = np.ones(self.terms.length, dtype=np.float32)
        return self.timed(name, lambda: client.answer(message, self.encoding.release(update, None)))


def _whole_round(size: int, parameters: int, *, gone: int) -> dict[str, Any]:
    world = _World(size, parameters, size, size - 1)
    outgoing = world.advertise()
    for step in range(4):
        for place, (name, message) in enumerate(outgoing.items()):
            if step != 1 or place >= gone:
                world.server.receive(world.answer(name, message))
        if step < 3:
            outgoing = world.server.advance()
    start = time.perf_counter()
    aggregate = world.server.finish()
    unmask_s = time.perf_counter() - start
    one = world.encoding.release(np.ones(parameters, dtype=np.float32), None)
    if not (aggregate.values == (size - gone) * one).all():
        raise RuntimeError("the sum is wrong")
    return {
        "client_s": min(world.seconds[name] for name in aggregate.survivors),
        "unmask_s": unmask_s,
        "bytes": max(world.bytes.values()),
    }


def _one_client(size: int, parameters: int, complete_up_to: int) -> float:
    """The first hospital's round up to its upload, which is nearly all: the others never mask."""
    world = _World(size, parameters, complete_up_to, size - 5)
    for name, message in world.advertise().items():
        world.server.receive(world.answer(name, message))
    outgoing = world.server.advance()
    first = next(iter(outgoing))
    world.answer(first, outgoing[first])
    return world.seconds[first]


def _encoding(parameters: int) -> dict[str, float]:
    encoding = _example(parameters, noise_multiplier=0.0)
    update = np.random.default_rng(0).normal(size=parameters).astype(np.float32)
    encode_s = _best(lambda: encoding.release(update, None))
    noisy = _example(parameters, noise_multiplier=1.0)
    stream = SecretNoise.generate().stream("bench")
    both_s = _best(lambda: noisy.release(update, stream), repeats=1)
    return {"encode_s": encode_s, "noise_s": both_s - encode_s}


def _example(parameters: int, noise_multiplier: float) -> Encoding:
    return Encoding.fitting(
        length=parameters, clip_norm=1.0, units=1, hospitals=11, threshold=10, colluders=1,
        noise_multiplier=noise_multiplier,
    )  # fmt: skip


def _peak_copies(parameters: int) -> float:
    """Peak memory from a float32 update to its upload, in vectors of 4 bytes a parameter."""
    world = _World(3, parameters, 32, 3)
    for name, message in world.advertise().items():
        world.server.receive(world.answer(name, message))
    outgoing = world.server.advance()
    name = next(iter(outgoing))
    encoding = Encoding.fitting(
        length=parameters, clip_norm=1.0, units=1, hospitals=3, threshold=3, colluders=0,
        noise_multiplier=1.0,
    )  # fmt: skip
    stream = SecretNoise.generate().stream("bench")
    tracemalloc.start()
    update = np.ones(parameters, dtype=np.float32)
    vector = encoding.release(update, stream)
    del update
    upload = world.clients[name].answer(outgoing[name], vector)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if len(upload) < 4 * parameters:
        raise RuntimeError("nothing was sent")
    return peak / (4 * parameters)


def _keystreams(count: int, parameters: int) -> None:
    zeros, room = bytes(_PIECE_BYTES), bytearray(_PIECE_BYTES + 15)
    streams = [
        Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor() for _ in range(count)
    ]
    for _ in range(0, 4 * parameters, _PIECE_BYTES):
        for stream in streams:
            stream.update_into(zeros, room)


def _flower(count: int, parameters: int) -> None:
    """As ``secaggplus_mod._collect_masked_vectors``, with its default ranges."""
    update = parameters_multiply([np.ones(parameters, dtype=np.float32)], 1.0)
    vector = factor_combine(1, quantize(update, 8.0, 2**22))
    for one in range(count):
        shapes = [part.shape for part in vector]
        mask = pseudo_rand_gen(one.to_bytes(32, "big"), _FLOWER_RANGE, shapes)
        add = parameters_addition if one % 2 else parameters_subtraction
        vector = add(vector, mask)
    for part in parameters_mod(vector, _FLOWER_RANGE):
        ndarray_to_bytes(part)


def _best(call: Callable[[], object], repeats: int = _REPEATS) -> float:
    """The shortest of ``repeats`` runs: other work on the machine only ever adds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
