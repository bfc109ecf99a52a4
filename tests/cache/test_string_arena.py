"""Texts are stored side by side, and the place of a removed text is used again."""

import random

from gcs_prefetchd.cache.string_arena import INITIAL_BYTES, StringArena


def test_every_text_is_returned_as_it_was_stored() -> None:
    arena = StringArena(255)
    texts = [bytes([length]) * length for length in range(1, 256)]
    numbers = [arena.add(text) for text in texts]
    assert [arena.get(number, len(text)) for number, text in zip(numbers, texts, strict=True)] == texts


def test_an_arena_grows_without_losing_a_text() -> None:
    arena = StringArena(255)
    texts = [b"%0200d" % number for number in range(3 * INITIAL_BYTES // 200)]
    numbers = [arena.add(text) for text in texts]
    assert [arena.get(number, 200) for number in numbers] == texts


def test_a_removed_texts_place_is_used_again_by_a_text_of_as_many_cells() -> None:
    arena = StringArena(255)
    first, _ = arena.add(b"abcde"), arena.add(b"fgh")
    arena.remove(first, 5)
    assert arena.add(b"123") != first
    assert arena.add(b"12345678") == first


def test_adding_and_removing_texts_needs_no_more_space() -> None:
    arena, chance = StringArena(255), random.Random(1)
    stored = {arena.add(text): text for text in (chance.randbytes(chance.randrange(1, 256)) for _ in range(200))}
    highest = max(stored)
    for _ in range(2000):
        number = chance.choice(list(stored))
        text = stored.pop(number)
        arena.remove(number, len(text))
        replacement = chance.randbytes(len(text))
        stored[arena.add(replacement)] = replacement
    assert max(stored) == highest
    assert all(arena.get(number, len(text)) == text for number, text in stored.items())
