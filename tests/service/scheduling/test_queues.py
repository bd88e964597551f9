from dataclasses import dataclass
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from service.execution.plan import BatchPlan
from service.scheduling.queues import Batch, Item, Queue, Queues


@dataclass(eq=False, slots=True)
class Numbered(Item):
    number: int


def filled(queues: Queues[Numbered], queue: Queue[Numbered], count: int, arrived: float = 0.0) -> list[Numbered]:
    items = [Numbered(i, arrived=arrived) for i in range(count)]
    for item in items:
        queues.add(queue, item)
    return items


def take(queues: Queues[Numbered], now: float = 0.0, idle: int = 1) -> Batch[Numbered]:
    batch = queues.take(now, idle)
    assert isinstance(batch, Batch)
    return batch


def queue(sizes: dict[int, float] | None = None) -> Queue[Numbered]:
    return Queue(BatchPlan(sizes or {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4}))


def test_nothing_is_taken_when_nothing_waits() -> None:
    assert Queues[Numbered]().take(0.0, 1) is None


def test_an_idle_instance_takes_a_lone_image_at_once() -> None:
    queues, a = Queues[Numbered](), queue()
    (item,) = filled(queues, a, 1)

    batch = take(queues)

    assert (batch.items, batch.reason) == ((item,), "idle")
    assert len(queues) == 0


def test_the_batch_in_front_has_grown_while_all_instances_were_busy() -> None:
    queues, a = Queues[Numbered](), queue()
    items = filled(queues, a, 20)

    batch = take(queues)

    assert batch.items == tuple(items[:8])
    assert batch.reason == "full"
    assert len(queues) == 12


def test_idle_instances_share_what_waits_evenly() -> None:
    queues, a = Queues[Numbered](), queue()
    filled(queues, a, 4)

    assert [len(take(queues, idle=idle).items) for idle in (2, 1)] == [2, 2]


def test_with_a_delay_a_batch_is_held_until_it_is_due() -> None:
    queues, a = Queues[Numbered](max_delay_seconds=0.5), queue()
    filled(queues, a, 3, arrived=10.0)

    assert queues.take(10.2, 1) == 10.5
    batch = take(queues, now=10.5)
    assert (len(batch.items), batch.reason) == (3, "delay")


def test_with_a_delay_a_full_batch_goes_at_once() -> None:
    queues, a = Queues[Numbered](max_delay_seconds=0.5), queue()
    filled(queues, a, 8)

    assert take(queues).reason == "full"


def test_items_too_late_leave_before_they_cost_anything() -> None:
    queues, a = Queues[Numbered](), queue()
    late, early = Numbered(0, latest=1.0), Numbered(1, latest=3.0)
    queues.add(a, late)
    queues.add(a, early)

    assert list(queues.expire(2.0)) == [(a, late)]
    assert take(queues).items == (early,)


def test_a_discarded_item_is_never_taken() -> None:
    queues, a = Queues[Numbered](), queue()
    first, second = filled(queues, a, 2)

    assert queues.discard(a, first)
    assert not queues.discard(a, first)
    assert take(queues).items == (second,)


def test_a_flood_on_one_model_does_not_keep_a_trickle_on_another_waiting() -> None:
    queues, flood, trickle = Queues[Numbered](), queue({1: 1.0}), queue({1: 1.0})
    filled(queues, flood, 1000, arrived=0.0)
    for _ in range(10):
        assert take(queues).queue is flood

    filled(queues, trickle, 1, arrived=10.0)

    assert trickle in [take(queues).queue for _ in range(2)]


def test_a_model_that_was_idle_has_saved_up_no_claim() -> None:
    queues, busy, idle = Queues[Numbered](), queue({1: 1.0}), queue({1: 1.0})
    filled(queues, busy, 100)
    for _ in range(50):
        take(queues)

    filled(queues, idle, 100)

    served = [take(queues).queue for _ in range(20)]
    assert served.count(idle) in {10, 11}


def test_shares_are_of_time_and_not_of_images() -> None:
    queues, slow, quick = Queues[Numbered](), queue({1: 4.0}), queue({1: 1.0})
    filled(queues, slow, 100)
    filled(queues, quick, 100)

    served = [take(queues).queue for _ in range(50)]

    assert served.count(slow) == 10


def test_without_a_plan_items_go_one_by_one_and_cost_what_the_caller_says() -> None:
    queues, slow, quick = Queues[Numbered](), Queue[Numbered](None), Queue[Numbered](None)
    filled(queues, slow, 100)
    filled(queues, quick, 100)

    served = []
    for _ in range(50):
        batch = take(queues, idle=3)
        assert len(batch.items) == 1
        batch.queue.charge("", 4.0 if batch.queue is slow else 1.0)
        served.append(batch.queue)

    assert served.count(slow) == 10


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.floats(0, 50) | st.just(inf))),
    st.lists(st.integers(1, 4), min_size=1),
)
def test_every_item_leaves_exactly_once_in_the_order_of_its_model(
    arrivals: list[tuple[str, int, float]], idle: list[int]
) -> None:
    queues = Queues[Numbered]()
    named = {name: queue() for name in "abc"}
    items = [
        (named[name], Numbered(i, arrived=float(i), latest=deadline)) for i, (name, _, deadline) in enumerate(arrivals)
    ]
    left: list[Numbered] = []
    for turn, (target, item) in enumerate(items):
        queues.add(target, item)
        left += [expired for _, expired in queues.expire(float(turn))]
        if turn % 2:
            left += take(queues, float(turn), idle[turn % len(idle)]).items if len(queues) else ()

    taken: dict[Queue[Numbered], list[int]] = {}
    while len(queues):
        batch = take(queues, 100.0)
        assert batch.queue.plan is not None
        assert len(batch.items) <= batch.queue.plan.largest
        taken.setdefault(batch.queue, []).extend(item.number for item in batch.items)
        left += batch.items

    assert sorted(item.number for item in left) == [item.number for _, item in items]
    assert all(order == sorted(order) for order in taken.values())


STEEP = {1: 1.0, 2: 1.9, 4: 3.6, 8: 7.0}


def waiting(sizes: dict[int, float], **clients: int) -> tuple[Queues[Numbered], Queue[Numbered]]:
    """As many images of each client as named; they came in this order."""
    queues, a = Queues[Numbered](), queue(sizes)
    for client, count in clients.items():
        for number in range(count):
            queues.add(a, Numbered(number, client=client))
    return queues, a


def test_an_image_of_who_has_few_runs_in_no_batch_that_takes_over_twice_as_long() -> None:
    queues, a = waiting(STEEP, flood=100)
    take(queues)
    queues.add(a, Numbered(0, client="polite"))

    batch = take(queues)

    assert "polite" in {item.client for item in batch.items}
    assert len(batch.items) == 2  # 1.9 is less than twice 1.0; 4 would take 3.6
    assert len(take(queues).items) == 8  # the flood's own are as large as ever


def test_many_clients_with_few_images_each_share_full_batches() -> None:
    queues, _ = waiting(STEEP, **{f"client {i}": 1 + i % 2 for i in range(20)})

    assert [len(take(queues).items) for _ in range(3)] == [8, 8, 8]


def test_where_large_batches_take_hardly_longer_all_run_together() -> None:
    queues, _ = waiting({1: 1.0, 8: 1.5}, polite=1, flood=100)

    assert len(take(queues).items) == 8


def test_small_batches_for_who_has_few_cost_their_own_share() -> None:
    """A client that always has one image waiting gets no more instance time than the flood beside it."""
    queues, a = waiting(STEEP, flood=400)
    seconds = {"flood": 0.0, "polite": 0.0}
    for _ in range(60):
        if not any(item.client == "polite" for item in a.waiting):
            queues.add(a, Numbered(0, client="polite"))
        batch = take(queues)
        for item in batch.items:
            seconds[item.client] += STEEP[len(batch.items)] / len(batch.items)

    assert seconds["polite"] < seconds["flood"]
