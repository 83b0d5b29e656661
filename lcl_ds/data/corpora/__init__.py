"""Find the reader of a format by the name that ``python -m lcl_ds.data build`` knows.

Each is a generator of :class:`lcl_ds.data.corpora.record.RawDocument` over one input file, or over a part of a folder.
"""

from lcl_ds.data.corpora.comm import read_comm
from lcl_ds.data.corpora.folder import read_folder, read_image_folder
from lcl_ds.data.corpora.huggingface import read_huggingface
from lcl_ds.data.corpora.mint_pdf import read_mint_pdf
from lcl_ds.data.corpora.mmc4 import read_mmc4, read_mmc4_tar
from lcl_ds.data.corpora.parallel_lists import read_parallel_lists
from lcl_ds.data.corpora.record import Reader
from lcl_ds.data.corpora.shards import read_shard
from lcl_ds.data.corpora.table import read_csv, read_json_lines

READERS: dict[str, Reader] = {
    "folder": read_folder,
    "imagefolder": read_image_folder,
    "csv": read_csv,
    "tsv": read_csv,
    "jsonl": read_json_lines,
    "huggingface": read_huggingface,
    "mmc4": read_mmc4,
    "mmc4-tar": read_mmc4_tar,
    "obelics": read_parallel_lists,
    "omnicorpus": read_parallel_lists,
    "mint-html": read_parallel_lists,
    "mint-pdf": read_mint_pdf,
    "comm": read_comm,
    "img2dataset": read_shard,
    "shards": read_shard,
}
