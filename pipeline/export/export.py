"""An export from its settings to its account, `export.json`."""

import json
from typing import Any

from pipeline import storage
from pipeline.errors import OutputConflict
from pipeline.export.coco import export_coco
from pipeline.export.config import ExportConfig
from pipeline.export.dataset import Account, Dataset
from pipeline.export.panoptic import export_panoptic
from pipeline.export.png import export_png
from pipeline.export.sa1b import export_sa1b
from pipeline.export.yolo import export_yolo


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a finished run of masks in another form, and the account of it, first unfinished and then whole.

    Args:
        config: The settings, with canonical addresses.

    Returns:
        What `export.json` says: what was exported, how many images and masks are in it, and what is not and why.

    Raises:
        OutputConflict: the input is no run of masks, or the output holds a run or another export.
        SettingsError: shards of the input are missing.
        StorageError: an address cannot be read or written.
    """
    dataset = Dataset(config.input)
    document = config.determinants(dataset.document)
    _check_output(config, document)
    _write_document(config.output, document | {"state": "incomplete"})
    account, measured = Account(), {}
    match config.format:
        case "coco":
            export_coco(dataset, config.output, account)
        case "sa1b":
            export_sa1b(dataset, config.output, account)
        case "yolo-seg":
            measured = export_yolo(dataset, config.output, account, config.tolerance)
        case "png":
            export_png(dataset, config.output, account, config.flatten)
        case "panoptic":
            export_panoptic(dataset, config.output, account, config.flatten)
    document |= {"state": "complete"} | account.document() | measured
    _write_document(config.output, document)
    return document


def _check_output(config: ExportConfig, document: dict[str, Any]) -> None:
    """Files of two exports would be taken for one."""
    output = storage.redact(config.output)
    if storage.exists(f"{config.output}/run.json"):
        raise OutputConflict(f"{output} holds a run. Choose another output.")
    uri = f"{config.output}/export.json"
    if not storage.exists(uri):
        return
    there: dict[str, Any] = json.loads(storage.read_bytes(uri))
    if differing := [key for key, value in document.items() if there.get(key) != value]:
        raise OutputConflict(
            f"{output} holds another export, which differs in {', '.join(differing)}. Choose another output, or "
            "delete that one."
        )


def _write_document(output: str, document: dict[str, Any]) -> None:
    storage.write_atomic(f"{output}/export.json", (json.dumps(document, indent=2) + "\n").encode())
