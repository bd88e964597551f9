import asyncio

import pytest

from app.remote_images.shares import Key, Share, Shares, ShareTaken, Thresholds

ONE, OTHER, CLIENT = Key("host", "one"), Key("host", "other"), Key("client", "c")
SHARES = {"host": Share(1, 1), "client": Share(2, 5)}


def filled(places: Thresholds, *keys: Key) -> int:
    """How many places `keys` got."""
    count = 0
    while places.full(keys) is None:
        places.take(keys)
        count += 1
    return count


def test_one_key_gets_half_and_each_further_one_half_of_the_rest() -> None:
    places = Thresholds(16, SHARES)

    assert [filled(places, Key("host", str(number))) for number in range(5)] == [8, 4, 2, 1, 1]


def test_a_key_that_holds_none_gets_one_of_the_reserve_which_has_an_end() -> None:
    places = Thresholds(2, SHARES)

    assert [filled(places, Key("host", str(number))) for number in range(10)] == [1] * 8 + [0] * 2


def test_all_keys_of_a_place_must_have_a_share_left_and_the_one_that_has_none_is_told() -> None:
    places = Thresholds(9, SHARES)
    for number in range(5):
        places.take([Key("host", str(number)), CLIENT])
    places.take([OTHER, CLIENT])

    assert places.full([ONE, CLIENT]) == CLIENT
    assert places.full([ONE]) is None
    places.give_back([OTHER, CLIENT])
    assert places.full([ONE, CLIENT]) is None


async def test_who_waits_is_admitted_in_turn_and_passes_those_that_may_not() -> None:
    shares, order = Shares(2, SHARES), list[str]()

    async def work(key: Key, name: str, until: asyncio.Event) -> None:
        async with shares.place([key]):
            order.append(name)
            await until.wait()

    release, end = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(work(ONE, "first", release))
        waiting = [group.create_task(work(ONE, name, end)) for name in ("second", "third")]
        group.create_task(work(OTHER, "other", end))
        await asyncio.sleep(0)
        assert order == ["first", "other"]

        waiting[0].cancel()
        release.set()
        end.set()

    assert order == ["first", "other", "third"]


async def test_waiting_ends_in_time_and_leaves_nothing() -> None:
    shares = Shares(2, SHARES)
    async with shares.place([ONE]):
        for _ in range(3):
            with pytest.raises(ShareTaken) as caught:
                async with shares.place([ONE], 0.01):
                    pytest.fail("it was admitted")
            assert caught.value.key == ONE

    for _ in range(3):
        async with shares.place([ONE]):
            pass


async def test_the_room_to_wait_in_is_shared_too() -> None:
    shares = Shares(2, SHARES, room=4)

    async def work(key: Key) -> None:
        async with shares.place([key], 5):
            await asyncio.sleep(0)

    async with shares.place([ONE]), shares.place([OTHER]), asyncio.TaskGroup() as group:
        tasks = [group.create_task(work(ONE)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ShareTaken):
            await work(ONE)
        tasks.append(group.create_task(work(OTHER)))
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()


async def test_places_survive_cancellation_at_any_moment() -> None:
    shares = Shares(2, SHARES)

    async def work(turns: int) -> None:
        async with shares.place([ONE]):
            for _ in range(turns):
                await asyncio.sleep(0)

    for turns in range(6):
        tasks = [asyncio.create_task(work(number % 3)) for number in range(20)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert filled(shares._places, ONE) == 1
    assert not shares._waiting
