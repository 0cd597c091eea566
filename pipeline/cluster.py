"""The Ray cluster that $RAY_ADDRESS names, and whether it answers."""

import os
from typing import Final

from pipeline.errors import ClusterError

_ANSWER_SECONDS: Final = 6.0
_CLIENT: Final = "ray://"


def cluster_address() -> str | None:
    """The cluster of `$RAY_ADDRESS`; None where Ray is to be started on this machine: unset, empty or `local`."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in {"", "local"} else address


def check_answers() -> None:
    """Fail within ten seconds where `$RAY_ADDRESS` names a cluster that does not answer.

    Ray itself would try for minutes. Not asked are clusters behind TLS (`RAY_USE_TLS`), and addresses of other
    services than Ray's own.

    Raises:
        ClusterError: no address, or nothing there that speaks gRPC, as Ray's head and its client server do.
    """
    address = cluster_address()
    if address is None or os.environ.get("RAY_USE_TLS") == "1":
        return
    server = _server(address)
    if server is None:
        return
    import grpc  # noqa: PLC0415 (where training without Ray asks for the address, it need not be there)

    with grpc.insecure_channel(server, options=[("grpc.enable_http_proxy", 0)]) as channel:
        # Not `grpc.channel_ready_future`, whose thread may find the channel closed and print a traceback.
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            check(b"", timeout=_ANSWER_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() not in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}:
                return  # whatever is wrong with the call, something answered
            raise ClusterError(
                f"No Ray cluster answers at {server}, where RAY_ADDRESS={address} points. Give the host and port "
                "of its head (6379 unless `ray start --port` says otherwise; 8265 is the dashboard's), or unset "
                "RAY_ADDRESS to have Ray started on this machine."
            ) from error


def _server(address: str) -> str | None:
    """The host and port that an address leads to, as `ray.init` would find them; None for other services'."""
    if address.startswith(_CLIENT):
        return address.removeprefix(_CLIENT).split("?")[0]
    if "://" in address:
        return None
    from ray._private.services import canonicalize_bootstrap_address  # noqa: PLC0415 (as above)

    try:
        return canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError) as error:
        raise ClusterError(
            f"RAY_ADDRESS={address} leads to no Ray cluster: {error} Give the host and port of a cluster's head, "
            "or unset RAY_ADDRESS to have Ray started on this machine."
        ) from error
