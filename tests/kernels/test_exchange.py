"""How ranks meet before they exchange features, and the order of their transfers; on four gloo ranks."""

from collections import deque

import pytest

from tests.kernels.exchange_ranks import FIRST_CALL, MISMATCHES_WITH_COUNTS, PASSED_OVER
from tests.kernels.ranks import TIMEOUT_S

pytestmark = [pytest.mark.timeout(TIMEOUT_S + 60), pytest.mark.usefixtures("on_a_cpu")]


@pytest.fixture
def found(ranks):
    return [results["exchange"] for results in ranks]


def test_the_first_call_on_a_group_is_one_in_which_all_ranks_take_part(found):
    """NCCL needs that, and a ring with known counts leaves out ranks without pairs. Later calls exchange no more."""
    for rank, results in enumerate(found):
        (first, loss), (second, again) = results["fresh"]
        assert (first, second) == (1, 0)
        assert loss == again
        assert (loss > 0) == (FIRST_CALL[rank] > 0)


def test_a_group_that_is_set_up_again_under_its_old_name_meets_again(found):
    for results in found:
        assert len(set(results["names"])) == 1
        assert [gathers for gathers, _ in results["restart"]] == [1, 0, 1, 0]
        assert len({loss for _, loss in results["restart"]}) == 1


def test_auto_gathers_on_one_machine_whatever_the_launcher_tells_its_ranks(found):
    """LOCAL_WORLD_SIZE and visible GPUs may differ between ranks, or count one of many on the machine."""
    assert not any(results["one machine"] for results in found)
    assert not any(results["local world sizes"] for results in found)


def test_auto_takes_the_ring_on_all_ranks_as_soon_as_one_is_on_another_machine(found):
    assert all(results["two machines"] for results in found)


@pytest.mark.parametrize("index", range(len(MISMATCHES_WITH_COUNTS)))
def test_a_different_first_call_is_an_error_on_all_ranks_also_with_counts(found, index):
    for results in found:
        assert results["mismatch"][index].startswith("sigmoid_contrastive_loss was called differently by the ranks")
        assert ": rank 0 and 2 more: sigmoid_contrastive_loss with D 8, " in results["mismatch"][index]
        assert "; rank 1: sigmoid_contrastive_loss with D 8, dtype torch.float32, " in results["mismatch"][index]


def test_counts_that_are_not_those_of_a_rank_are_an_error_on_all_ranks(found):
    for results in found:
        assert results["wrong counts"] == "counts [2, 2, 2, 2] do not match: the ranks have [2, 3, 2, 2] pairs"


@pytest.mark.parametrize("counts", PASSED_OVER)
@pytest.mark.parametrize("loss", ["contrastive_loss", "sigmoid_contrastive_loss"])
def test_ranks_that_run_one_transfer_after_another_never_wait_in_a_circle(found, loss, counts):
    """As NCCL does, and gloo does not."""
    batches = [results[loss, counts] for results in found]
    assert any(batches)
    assert not left_over(batches)


def test_a_circle_is_seen():
    first = [[("send", 1)], [("receive", 1)]], [[("send", 0)], [("receive", 0)]]
    assert left_over(first)
    assert not left_over([[[("send", 1), ("receive", 1)]], [[("send", 0), ("receive", 0)]]])


def left_over(batches):
    """The batches of each rank that are never done if a rank starts one when the one before is done."""
    queues = [deque(list(batch) for batch in of_rank if batch) for of_rank in batches]
    moving = True
    while moving:
        moving = False
        for rank, queue in enumerate(queues):
            for kind, peer in list(queue[0] if queue else []):
                if kind == "send" and queues[peer] and ("receive", rank) in queues[peer][0]:
                    queue[0].remove((kind, peer))
                    queues[peer][0].remove(("receive", rank))
                    moving = True
        for queue in queues:
            if queue and not queue[0]:
                queue.popleft()
                moving = True
    return [list(queue) for queue in queues if queue]
