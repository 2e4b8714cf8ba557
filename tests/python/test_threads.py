"""Calls from several threads, and the interpreter lock."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import octomoe
from problems import random_input, random_weights


def test_one_layer_from_many_threads():
    weights = random_weights("int8_hybrid", 8, 128, 96)[0]
    layer = octomoe.MoeLayer(weights)
    inputs = [random_input(tokens, 128, 8, 2, seed=tokens) for tokens in (1, 3, 17, 40)] * 6
    expected = [layer(*one) for one in inputs]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda one: layer(*one), inputs))
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_many_layers_side_by_side():
    layers = [
        octomoe.MoeLayer(random_weights("int8_channel", 4, 64, 96, seed=s)[0]) for s in range(4)
    ]
    x, ids, topk_weights = random_input(30, 64, 4, 2)
    expected = [layer(x, ids, topk_weights) for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for a, b in zip(
                pool.map(lambda m: m(x, ids, topk_weights), layers), expected, strict=True
            ):
                np.testing.assert_array_equal(a, b)


def test_first_calls_race_for_one_layer():
    weights = random_weights("int8_channel", 4, 64, 96)[0]
    x, ids, topk_weights = random_input(3, 64, 4, 2)
    barrier = threading.Barrier(8)

    def run(_):
        barrier.wait()
        return octomoe.fused_moe(x, weights, topk_weights, ids)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(8)))
    assert len(weights._layers) == 1
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_the_interpreter_lock_is_released():
    """Another Python thread goes on while a long call runs."""
    random = np.random.default_rng(0)
    w = random.normal(size=(8, 1024, 512)).astype(np.float32)
    ticks, stop = [], threading.Event()

    def count():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    time.sleep(0.02)
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.2:
        octomoe.quantize_matrix(w, "int8_hybrid", threads=1)
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(begin < tick < end for tick in ticks) > 20
