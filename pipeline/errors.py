"""Every error that everymask raises on purpose.

    EverymaskError
    ├── SettingsError         what was asked for cannot be done           exit code 2
    │   └── OutputConflict    the output holds another run                exit code 2
    ├── PreflightError        nothing was started                         exit code 3
    │   ├── StorageError      an address cannot be read or written
    │   │   └── ChangedError  the object is not the version that was asked for
    │   ├── ClusterError      there is no Ray to run on
    │   ├── NoImages          no image under the address
    │   ├── CheckpointError   the weights are not what they must be
    │   ├── SelfCheckError    the model does not see what it should
    │   └── TrainingDataError pictures, masks or embeddings to train with are not what they must be
    ├── TooManyFailures       stopped early by --max-failure-rate         exit code 4
    ├── IncompleteRun         finished with shards missing                exit code 1
    ├── Diverged              a loss that is no number ended a training   exit code 5
    └── ImageError            one image's outcome: becomes a row, never ends a run

Messages say what happened, to which address, and what to do.
"""

from schemas.masks import Status


class EverymaskError(Exception):
    """Root of the tree. `exit_code` is the exit code of the command that it ends."""

    exit_code = 1


class SettingsError(EverymaskError):
    """What was asked for cannot be done."""

    exit_code = 2


class OutputConflict(SettingsError):
    """The output address holds another run, or lies inside the input."""


class PreflightError(EverymaskError):
    """Found before any worker was started."""

    exit_code = 3


class StorageError(PreflightError):
    """An address cannot be listed, read or written."""


class ChangedError(StorageError):
    """The object is not the version that was asked for."""


class ClusterError(PreflightError):
    """The Ray cluster that was asked for does not answer, or Ray cannot be started on this machine."""


class NoImages(PreflightError):
    """There is no image under the address."""


class CheckpointError(PreflightError):
    """A checkpoint has the wrong hash, is no checkpoint, or does not fit the model."""


class SelfCheckError(PreflightError):
    """The loaded model does not give the answers it is known to give."""


class TrainingDataError(PreflightError):
    """What there is to train with is missing, of another kind, or of another teacher."""


class TooManyFailures(EverymaskError):
    """More of the images failed than `max_failure_rate` allows."""

    exit_code = 4


class IncompleteRun(EverymaskError):
    """The run ended and some shards have no file."""

    exit_code = 1


class Diverged(EverymaskError):
    """A training's loss became infinite or no number. The last good checkpoint stays."""

    exit_code = 5


class ImageError(EverymaskError):
    """One image cannot be processed. `status` and the message become its row."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type["ImageError"], tuple[Status, str]]:
        return ImageError, (self.status, str(self))
