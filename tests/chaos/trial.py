"""A run through its events: the driver started anew whenever it has ended, until the dataset is complete."""

import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from faulty_proxy import Fault, FaultyProxy, faulty_proxy
from running import call, command
from runs_of_masks import job
from s3server import S3Server

from chaos.cluster import CPUS, TwoNodes, kill, two_nodes
from chaos.dataset import contents, make_undisturbed, put_images
from chaos.events import Event, Kind
from chaos.tally import Tally

_LATENCY_S: Final = 0.4  # of every request: it keeps a run of tiny pictures going for as long as its events need
_PATIENCE_S: Final = 600.0
_LOG_SHOWN: Final = 4000

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Course:
    """What trials have in common: a bucket with images, the undisturbed dataset, and where logs go."""

    server: S3Server
    bucket: str
    checkpoint: Path
    folder: Path
    images: int
    images_per_shard: int

    @property
    def input(self) -> str:
        return f"{self.bucket}/in"

    @property
    def undisturbed(self) -> str:
        return f"{self.bucket}/undisturbed"

    def prepare(self) -> None:
        """Put the images, and make the dataset that every trial must end with."""
        put_images(self.server, self.input, self.images)
        make_undisturbed(self.input, self.undisturbed, self.checkpoint, self.images_per_shard)


def run_trial(course: Course, seed: int, events: list[Event]) -> Tally:
    """Run the job through the events, and check what it leaves.

    Raises:
        AssertionError: the dataset is not sound, is not the undisturbed one, or too many images were read again.
    """
    output = f"{course.bucket}/seed-{seed}"
    with (
        faulty_proxy(course.server.endpoint, _LATENCY_S) as proxy,
        two_nodes({"AWS_ENDPOINT_URL": proxy.endpoint}) as cluster,
    ):
        trial = _Trial(course, output, seed, proxy, cluster)
        begin = time.monotonic()
        came = trial.run(events)
        tally = Tally(
            seed=seed,
            kinds=Counter(event.kind for event in came),
            resumes=trial.starts - 1,
            images=course.images,
            images_per_shard=course.images_per_shard,
            seconds=time.monotonic() - begin,
            reads=trial.reads(),
        )
    check(course, output)
    assert tally.read_again < tally.limit, f"{tally.read_again} images were read again"
    return tally


def check(course: Course, output: str) -> None:
    """Compare a dataset with the undisturbed one.

    Raises:
        AssertionError: it is not sound, or a row or a mask is another.
    """
    verified = call("jobs.verify_masks", "--output", output, "--processes", "1")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    expected, found = contents(course.server, course.undisturbed), contents(course.server, output)
    assert len(found) == course.images
    differing = [index for index, pair in enumerate(zip(expected, found, strict=True)) if len(set(pair)) > 1]
    assert not differing, f"other rows than undisturbed: {differing}"


class _Trial:
    """A driver, the cluster it runs on, and the line to its store."""

    def __init__(self, course: Course, output: str, seed: int, proxy: FaultyProxy, cluster: TwoNodes) -> None:
        self.starts = 0
        self._course, self._output, self._proxy, self._cluster = course, output, proxy, cluster
        self._draw = random.Random(seed)
        self._log = course.folder / f"seed-{seed}.log"
        self._driver = self._start()

    def run(self, events: list[Event]) -> list[Event]:
        """Let events come, and then the run end; return those that came before its end."""
        came = []
        try:
            for event in events:
                self._wait(lambda event=event: len(self.reads()) >= event.after)
                if self._disturb(event):
                    came.append(event)
            self._wait(self._is_complete)
        finally:
            self._driver.kill()
            self._driver.wait()
        return came

    def reads(self) -> list[float]:
        """When images were sent whole."""
        path = f"GET /{self._course.input.removeprefix('s3://')}/"
        return [
            one.at
            for one in self._proxy.exchanges
            if one.request.startswith(path) and one.fault in {None, Fault.DELAY}
        ]

    def _disturb(self, event: Event) -> bool:
        """Do what the event says; whether there was still something to disturb."""
        self._wait(lambda: self._cluster.workers() or self._is_complete())
        workers = self._cluster.workers()
        if not workers:
            return False
        self._note(str(event))
        match event.kind:
            case Kind.WORKER:
                kill(self._draw.choice(workers))
            case Kind.NODE:
                self._cluster.lose_other_node()
            case Kind.DRIVER:
                self._driver.kill()
                self._driver.wait()
            case Kind.STORE:
                assert event.fault
                self._proxy.spoil(event.fault, event.requests)
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the driver, each time with another number of workers."""
        workers = CPUS - self.starts % CPUS
        self.starts += 1
        flags = ["--images-per-shard", str(self._course.images_per_shard), "--num-workers", str(workers)]
        flags += ["--cpus-per-worker", "1", "--read-ahead", "1", "--retry-failed"]
        self._note(f"start {self.starts} with {workers} workers")
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command(*job(self._course.checkpoint, self._course.input, self._output, *flags)),
                env=os.environ | {"RAY_ADDRESS": self._cluster.address, "AWS_ENDPOINT_URL": self._proxy.endpoint},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait(self, until: Callable[[], T]) -> T:
        """Wait for something true, with a driver that is started anew whenever it has ended before the run."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            if self._driver.poll() is not None and not self._is_complete():
                self._note(f"the driver has ended with {self._driver.returncode}")
                self._driver = self._start()
            if result := until():
                return result
            assert time.monotonic() < deadline, self._log.read_text(errors="replace")[-_LOG_SHOWN:]
            time.sleep(0.1)

    def _is_complete(self) -> bool:
        """Whether a driver has come to the end, and no image has failed, which ends a run with exit code 0 too."""
        if self._driver.poll() != 0:
            return False
        summary = self._course.server.client().cat_file(f"{self._output}/summary.json")
        return not json.loads(summary)["failed"]

    def _note(self, text: str) -> None:
        with self._log.open("a") as log:
            print(f"--- {len(self.reads())} images read: {text}", file=log)
