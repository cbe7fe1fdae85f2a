"""What the terminal and the page say alike."""

from collections.abc import Iterator

from bigtune.report.inspection import Inspection, PackedRow, Packing


def cuts_told(inspection: Inspection) -> Iterator[tuple[int, str]]:
    """(documents, what became of them): those that are trained on in part, or not in this epoch."""
    length = f"{inspection.sequence_length:,} tokens"
    if inspection.truncated_documents:
        yield inspection.truncated_documents, f"truncated to {length}: {inspection.truncated_tokens:,} tokens lost"
    if inspection.split_documents:
        yield inspection.split_documents, f"split into pieces of {length}"
    if inspection.waiting_documents:
        yield inspection.waiting_documents, "not in this epoch, because of the sources' weights"


def row_told(row: PackedRow) -> str:
    """How full a row is, and of how many documents."""
    documents = f"{len(row.documents):,} document{'s' * (len(row.documents) != 1)}"
    return f"{documents}, {row.tokens:,} of {row.sequence_length:,} tokens: {row.fill:.1%} full"


def steps_told(packing: Packing) -> str:
    """How many steps there are."""
    told = f"of {packing.global_batch:,} rows each: {packing.run_steps:,} in the run"
    if packing.steps is None:
        return told
    return f"{told}, {packing.steps:,} an epoch ({packing.run_steps / packing.steps:.1f} epochs)"


def imbalance_told(packing: Packing) -> str:
    """How uneven the loads of ranks get."""
    if packing.ranks == 1:
        return "none, with one rank"
    work, supervised = packing.work_imbalance - 1, packing.supervised_imbalance - 1
    return (
        f"+{work:.1%} attention work, +{supervised:.1%} supervised tokens over the mean of {packing.ranks} ranks "
        f"(micro batch {packing.micro_batch})"
    )
