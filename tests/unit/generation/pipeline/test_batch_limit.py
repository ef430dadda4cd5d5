import gc
import weakref

import pytest
import torch

from generation.pipeline import batch_limit
from generation.pipeline.batch_limit import BatchLimit, in_batches, is_out_of_memory


def raised(error: Exception, cause: Exception | None = None, context: Exception | None = None) -> Exception:
    try:
        if context is None:
            raise error from cause
        try:
            raise context
        except Exception:
            raise error  # noqa: B904 (the context is what is tested)
    except Exception as caught:
        return caught


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FULL, True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), False),
        (raised(RuntimeError("a stage failed"), cause=FULL), True),
        (raised(RuntimeError("a stage failed"), context=FULL), True),
        (raised(ValueError("outer"), cause=raised(RuntimeError("inner"), context=FULL)), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError(), False),  # of the machine, which a smaller batch on the GPU does not help
        (RuntimeError("a prompt about being out of memory"), False),
        (None, False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


class TestBatchLimit:
    def go_well(self, limit, count):
        for _ in range(count):
            limit.succeeded()

    def test_halves_and_never_falls_under_one(self):
        limit = BatchLimit(8)
        seen = []
        for _ in range(5):
            limit.out_of_memory(limit.current)
            seen.append(limit.current)
        assert seen == [4, 2, 1, 1, 1]

    def test_halves_what_ran_and_not_what_might_have(self):
        limit = BatchLimit(8)
        limit.out_of_memory(3)
        assert limit.current == 1

    def test_a_late_error_of_a_larger_batch_raises_nothing(self):
        limit = BatchLimit(8)
        limit.out_of_memory(2)
        limit.out_of_memory(8)
        assert limit.current == 1

    def test_grows_back_by_one_after_enough_good_ones_in_a_row(self):
        limit = BatchLimit(4)
        limit.out_of_memory(4)
        self.go_well(limit, 19)
        assert limit.current == 2
        limit.out_of_memory(2)  # the row is broken
        self.go_well(limit, 19)
        assert limit.current == 1
        for current in (2, 3):  # as many more for each
            limit.succeeded()
            assert limit.current == current
            self.go_well(limit, 19)
            assert limit.current == current

    def test_never_grows_over_the_most(self):
        limit = BatchLimit(2)
        limit.out_of_memory(2)
        self.go_well(limit, 100)
        assert limit.current == 2


class Card:
    """Stands for a GPU that has room for so many items at once."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.batches: list[list[int]] = []

    def work(self, batch: list[int]) -> list[int]:
        self.batches.append(batch)
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [10 * item for item in batch]


class TestInBatches:
    def test_all_at_once_when_there_is_room(self):
        card = Card(room=4)
        assert in_batches(BatchLimit(4), range(6), card.work) == [0, 10, 20, 30, 40, 50]
        assert card.batches == [[0, 1, 2, 3], [4, 5]]

    def test_a_batch_that_does_not_fit_is_done_again_in_smaller_ones(self):
        card, limit = Card(room=1), BatchLimit(4)
        assert in_batches(limit, range(4), card.work) == [0, 10, 20, 30]
        assert card.batches == [[0, 1, 2, 3], [0, 1], [0], [1], [2], [3]]
        assert limit.current == 1

    def test_batches_are_no_requests(self):
        card, limit = Card(room=4), BatchLimit(4)
        limit.out_of_memory(4)
        in_batches(limit, range(100), card.work)
        assert limit.current == 2

    def test_what_was_done_is_not_done_again(self):
        results = iter([[1, 2], torch.OutOfMemoryError("full"), [3], [4]])
        seen = []

        def work(batch):
            seen.append(batch)
            result = next(results)
            if isinstance(result, Exception):
                raise result
            return result

        assert in_batches(BatchLimit(2), "abcd", work) == [1, 2, 3, 4]
        assert seen == [["a", "b"], ["c", "d"], ["c"], ["d"]]

    def test_one_alone_that_does_not_fit_is_an_error(self):
        with pytest.raises(torch.OutOfMemoryError):
            in_batches(BatchLimit(2), range(2), Card(room=0).work)

    def test_other_errors_are_not_tried_again(self):
        calls = []

        def work(batch):
            calls.append(batch)
            raise ValueError("not a matter of memory")

        with pytest.raises(ValueError, match="not a matter of memory"):
            in_batches(BatchLimit(4), range(4), work)
        assert len(calls) == 1

    def test_what_the_failed_batch_held_is_free_before_the_cache_is_released(self, monkeypatch):
        class Held:
            pass

        held: list[weakref.ref[Held]] = []
        alive_at_release = []

        def release():
            gc.collect()
            alive_at_release.append(held[0]() is not None)

        monkeypatch.setattr(batch_limit, "release_cache", release)

        def work(batch):
            tensor = Held()
            if len(batch) > 1:
                held.append(weakref.ref(tensor))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return batch

        in_batches(BatchLimit(2), range(2), work)
        assert alive_at_release == [False]

    def test_nothing_to_do(self):
        assert in_batches(BatchLimit(2), [], Card(room=0).work) == []
