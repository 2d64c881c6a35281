"""VRAM classes: cards sold as one size count as one size."""

from __future__ import annotations

import pytest

from qbatch.core.byte_units import GIB
from qbatch.core.vram_classes import VRAM_CLASSES, floor_bytes, show_need, vram_class

# What NVML shows of cards in MiB, by the size that they are sold as.
SHOWN = {
    8: (8192, 8188, 7680),
    12: (12288, 11264),
    16: (16384, 16376, 16160, 15360),
    24: (24576, 24564, 23034, 23028),
    32: (32768, 32607, 32510),
    40: (40960, 40536),
    48: (49140, 48685, 46068),
    80: (81920, 81559),
    96: (97887, 97871, 95830),
    141: (143771,),
    192: (183359,),
}


@pytest.mark.parametrize(("sold", "shown"), [(sold, shown) for sold, each in SHOWN.items() for shown in each])
def test_a_card_is_of_the_class_that_it_is_sold_as(sold: int, shown: int) -> None:
    assert vram_class(shown * 2**20) == sold


def test_every_memory_is_of_one_class_and_more_is_never_of_a_smaller_one() -> None:
    classes = [vram_class(gib * GIB) for gib in range(1, 1000)]
    assert classes == sorted(classes)
    assert set(classes) == set(VRAM_CLASSES)
    assert vram_class(0) == VRAM_CLASSES[0]


def test_a_class_promises_no_more_than_each_of_its_cards_has() -> None:
    for gib in range(1, 300):
        assert floor_bytes(vram_class(gib * GIB)) <= gib * GIB
    floors = [floor_bytes(size) for size in VRAM_CLASSES]
    assert floors == sorted(set(floors))
    assert all(floor > size * GIB for size, floor in zip(VRAM_CLASSES, floors[1:], strict=False))


def test_a_need_is_named_by_the_size_that_is_too_small() -> None:
    assert show_need(int(22.5 * GIB)) == "needs a GPU of more than 24 GiB"
    assert show_need(int(140.4 * GIB)) == "needs a GPU of more than 141 GiB"
    assert show_need(28 * GIB) == "needs a GPU of more than 28 GiB"
