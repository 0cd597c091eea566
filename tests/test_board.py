"""The board, and what workers post there."""

import time

from pipeline.board import SLOWEST, Board, Post, Spare
from pipeline.ledger import ATTEMPTS
from pipeline.phases import Phase
from pipeline.posting import ShardPosts
from pipeline.shard import ImageDone
from schemas.progress import SlowImage


def expecting(*shards: int) -> Board:
    board = Board()
    board.expect(list(shards))
    return board


def post(shard: int, images: int = 1, slow: list[SlowImage] | None = None, worker: str = "a") -> Post:
    """Of a worker that has had image 7 at hand for three seconds."""
    at_hand = {"image_id": 7, "uri": "s3://b/7.jpg", "seconds": 3.0}
    return Post(worker, shard, images, 5 * images, {"truncated": 1}, at_hand, slow or [])  # type: ignore[arg-type]


def slow_image(image_id: int, seconds: float) -> SlowImage:
    return {"image_id": image_id, "uri": f"s3://b/{image_id}.jpg", "seconds": seconds, "status": "ok"}


def test_what_is_in_work_is_what_was_begun_and_last_said() -> None:
    board = expecting(3, 4)
    assert (board.begin(3, "a"), board.begin(4, "b")) == (1, 1)
    assert board.report(post(3, 2))
    assert board.report(post(3, 4))
    time.sleep(0.05)
    work = board.read()
    assert (work.images, work.masks, work.failures) == (4, 20, {"truncated": 1})
    three, four = work.at_work
    assert (three.post.shard, three.attempt, four.post.images) == (3, 1, 0)
    assert three.post.image is not None
    assert three.post.image["seconds"] == 3 + three.silent_seconds > 3.05 - 1e-9
    assert three.seconds >= three.silent_seconds
    board.made(3, "a")
    assert not board.report(post(3, 9))  # a worker that is late
    assert [one.post.shard for one in board.read().at_work] == [4]
    assert not board.over()
    board.made(4, "b")
    assert board.over()


def test_a_shard_that_two_workers_have_counts_once_and_is_wanted_of_the_other_no_more() -> None:
    board = expecting(3, 4)
    assert board.begin(3, "a") == 1
    assert board.spare("b") == Spare(4, 1, over=False)
    time.sleep(0.05)
    board.made(4, "b")
    time.sleep(0.1)
    assert board.spare("b") == Spare(3, 1, over=False)  # which takes longer than the other did
    board.report(post(3, 2, worker="a"))
    board.report(post(3, 5, worker="b"))
    assert (len(board.read().at_work), board.read().images, board.read().masks) == (2, 5, 25)
    board.made(3, "b")
    assert not board.report(post(3, 3, worker="a"))
    assert board.read().at_work == ()
    board.failed(3, "a", "")
    assert board.read().failed_shards == ()
    assert board.read().died == 0
    assert board.spare("b") == Spare(None, 0, over=True)


def test_a_shard_begun_again_is_a_worker_that_died() -> None:
    board = expecting(3)
    board.begin(3, "a")
    board.report(post(3))
    assert board.begin(3, "a") == 2
    [again] = board.read().at_work
    assert (again.attempt, again.post.images) == (2, 0)
    assert again.died_at == {"image_id": 7, "uri": "s3://b/7.jpg", "seconds": 3.0}
    assert board.read().died == 1
    board.made(3, "a")
    assert board.begin(3, "a") == 0
    assert board.read().died == 1


def test_a_worker_that_is_told_to_go_did_not_die() -> None:
    board = expecting(3)
    assert board.begin(3, "a") == 1
    board.report(post(3))
    board.give_back(3, "a")
    assert board.read().at_work == ()
    assert not board.over()
    assert board.begin(3, "b") == 1
    assert board.read().died == 0


def test_a_shard_that_kills_its_workers_is_no_longer_in_work() -> None:
    board = expecting(3)
    attempts = [board.begin(3, "a") for _ in range(ATTEMPTS + 1)]
    assert attempts == [1, 2, 3, 4, 5, 6, 7]
    assert board.read().at_work == ()
    assert board.read().died == ATTEMPTS
    assert board.read().failed_shards == ({"shard": 3, "error": "it has killed its worker 6 times"},)


def test_what_failed_is_remembered_unless_the_run_was_stopped() -> None:
    board = expecting(3, 4)
    board.begin(3, "a")
    board.failed(3, "a", "no space left")
    assert board.read().at_work == ()
    assert board.read().failed_shards == ({"shard": 3, "error": "no space left"},)
    board.begin(4, "a")
    board.close()
    board.failed(4, "a", "the run was stopped")
    assert [failed["shard"] for failed in board.read().failed_shards] == [3]


def test_a_stopped_run_writes_no_more() -> None:
    board = expecting(1, 2)
    assert board.begin(1, "a") == 1
    assert board.may_write("a")
    assert not board.close()  # shard 1 is being written
    assert not board.may_write("b")
    board.made(1, "a")
    assert board.close()


def test_the_slowest_images_of_all_posts_are_remembered_once_each() -> None:
    board = expecting(1)
    for image_id in range(SLOWEST + 5):
        board.report(post(1, slow=[slow_image(image_id, float(image_id))]))
    board.report(post(1, slow=[slow_image(9, 100.0), slow_image(8, 0.5)]))
    slowest = board.read().slowest
    assert [image["image_id"] for image in slowest] == [9, 14, 13, 12, 11, 10, 8, 7, 6, 5]
    assert slowest[0]["seconds"] == 100.0
    assert slowest[6]["seconds"] == 8.0


def test_a_post_says_what_is_at_hand_and_since_when() -> None:
    posts = ShardPosts("a", 2)
    assert posts.post() == Post("a", 2, 0, 0, {}, None, [])
    posts.begin(11, "https://me:secret@host/11.jpg")
    time.sleep(0.05)
    image = posts.post().image
    assert image is not None
    assert (image["image_id"], image["uri"]) == (11, "https://***@host/11.jpg")
    assert 0.05 <= image["seconds"] < 5
    posts.done(ImageDone(11, "https://me:secret@host/11.jpg", "timeout", 0, {}, None))
    said = posts.post()
    assert said[:6] == ("a", 2, 1, 0, {"timeout": 1}, None)
    [slow] = said.slow
    assert (slow["uri"], slow["status"]) == ("https://***@host/11.jpg", "timeout")
    assert 0.05 <= slow["seconds"] < 5
    assert posts.post().slow == []  # it was said


def test_an_image_that_was_encoded_with_others_is_as_slow_as_its_phases() -> None:
    posts = ShardPosts("a", 0)
    posts.begin(1, "x")
    seconds: dict[Phase, float] = {"decode": 7.0, "encode": 2.0, "decode_masks": 3.0, "post_process": 4.0}
    posts.done(ImageDone(1, "x", "ok", 2, seconds, None))
    assert [image["seconds"] for image in posts.post().slow] == [9.0]


def test_of_many_images_only_those_are_posted_that_may_be_among_the_slowest() -> None:
    posts = ShardPosts("a", 0)
    for image_id in range(3 * SLOWEST):
        posts.begin(image_id, "x")
        time.sleep(0.1 if image_id == 5 else 0)
        posts.done(ImageDone(image_id, "x", "ok", 2, {}, None))
    said = posts.post()
    assert (said.images, said.masks, said.failures) == (3 * SLOWEST, 6 * SLOWEST, {})
    assert len(said.slow) == SLOWEST
    assert 5 in [image["image_id"] for image in said.slow]
    posts.begin(100, "x")
    time.sleep(0.1)
    posts.done(ImageDone(100, "x", "ok", 2, {}, None))
    assert 100 in [image["image_id"] for image in posts.post().slow]
