"""The order of an epoch and the shares of its ranks, once more: slow, in plain integers, and written to be read.

The tests hold the native ones (native/data/order.h, share.h) against these, number for number. Whoever changes what
this computes changes the order of every job: ORDER_VERSION must be raised and golden_order.json written anew.
"""

from __future__ import annotations

from collections.abc import Iterator

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15
TABLE_RECORDS = 65536
ROUNDS = 8
RECORDS, EXTENTS, WINDOWS = range(3)


def mix(value: int) -> int:
    """The first number of a SplitMix64 generator with this seed."""
    value = (value + GOLDEN) % WORD
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % WORD
    return value ^ (value >> 31)


def derive(key: int, part: int) -> int:
    return mix((key + part) % WORD)


def split_mix(seed: int) -> Iterator[int]:
    while True:
        yield mix(seed)
        seed = (seed + GOLDEN) % WORD


def draw(numbers: Iterator[int], count: int) -> int:
    """0 .. count - 1, each as likely: 32-bit numbers whose low product falls into the uneven rest are thrown away."""
    while True:
        product = (next(numbers) >> 32) * count
        if product % 2**32 >= 2**32 % count:
            return product >> 32


def shuffled(n: int, key: int) -> list[int]:
    """Fisher and Yates, from the end."""
    table, numbers = list(range(n)), split_mix(key)
    for last in range(n - 1, 0, -1):
        other = draw(numbers, last + 1)
        table[last], table[other] = table[other], table[last]
    return table


class Network:
    """A Feistel network over the bits of n - 1, with cycle walking."""

    def __init__(self, n: int, key: int) -> None:
        bits = max(4, (max(n, 1) - 1).bit_length())
        self.n, self.low_bits, self.high_bits = n, bits // 2, bits - bits // 2
        numbers = split_mix(key)
        self.keys = [divmod(next(numbers), 2**32)[::-1] for _ in range(ROUNDS)]

    @staticmethod
    def scramble(word: int, first: int, second: int) -> int:
        word = (word ^ first) * 0x7FEB352D % 2**32
        word = (word ^ (word >> 15)) + second
        word = word % 2**32 * 0x846CA68B % 2**32
        return word ^ (word >> 16)

    def __call__(self, index: int) -> int:
        if self.n <= 1:
            return index
        while True:
            low, high = index % 2**self.low_bits, index >> self.low_bits
            for number, (first, second) in enumerate(self.keys):
                if number % 2 == 0:
                    high ^= self.scramble(low, first, second) % 2**self.high_bits
                else:
                    low ^= self.scramble(high, first, second) % 2**self.low_bits
            index = (high << self.low_bits) + low
            if index < self.n:
                return index


class Permutation:
    def __init__(self, n: int, key: int) -> None:
        self.table = shuffled(n, key) if n <= TABLE_RECORDS else []
        self.network = Network(n, key)

    def __call__(self, index: int) -> int:
        return self.table[index] if self.table else self.network(index)


def blocks(seed_key: int, n: int, extent: int, window: int, lanes: int) -> list[int]:
    """All positions of the order ``blocks``, the way its definition tells it."""
    extents = [range(first, min(first + extent, n)) for first in range(0, n, extent)]
    move = Permutation(len(extents), derive(seed_key, EXTENTS))
    moved = [record for slot in range(len(extents)) for record in extents[move(slot)]]
    lane_orders = []
    begin = 0
    for lane in range(lanes):
        length = n // lanes + (lane < n % lanes)
        records, mixed = moved[begin : begin + length], []
        for number, first in enumerate(range(0, length, window * extent)):
            chunk = records[first : first + window * extent]
            key = derive(derive(derive(seed_key, WINDOWS), lane), number)
            permute = Network(len(chunk), key)
            mixed += [chunk[permute(index)] for index in range(len(chunk))]
        lane_orders.append(mixed)
        begin += length
    return [lane_orders[position % lanes][position // lanes] for position in range(n)]


def order(shuffle: str, seed: int, epoch: int, n: int, extent: int = 1, window: int = 1, lanes: int = 1) -> list[int]:
    """The record at each position of an epoch."""
    key = derive(mix(seed), epoch)
    if shuffle == "none":
        return list(range(n))
    if shuffle == "blocks":
        return blocks(key, n, extent, window, lanes)
    permute = Permutation(n, derive(key, RECORDS))
    return [permute(position) for position in range(n)]


def share(
    positions: list[int], base: int, world: int, rank: int, batch: int, lanes: int, tail: str
) -> list[tuple[list[int], int]]:
    """What a rank reads at each step from position ``base`` on: its records, and how many of them are no padding."""
    found = []
    step_rows = world * batch
    for begin in range(base, len(positions), step_rows):
        own = range(begin, min(begin + step_rows, len(positions)))
        if len(own) < step_rows and tail == "drop":
            break
        rows = [positions[place] for lane in range(lanes) for place in own if place % lanes == lane]
        valid = max(0, min(batch, len(rows) - rank * batch))
        if tail == "pad":
            rows += [positions[row % len(positions)] for row in range(step_rows - len(rows))]
        found.append((rows[rank * batch : (rank + 1) * batch], valid))
    return found
