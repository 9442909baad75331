#!/usr/bin/env bash
# Where the members of a WebDataset sample are not next to each other in the archive (all images first,
# then all labels, as "tar --sort=name" of two folders gives them, or "tar *.png *.cls"), NVIDIA DALI
# 2.4.0 and webdataset 1.0.2 both deliver twice as many samples as there are, without an error: half of
# them have an image and no label, half a label and no image. DALI fills what is missing with an empty
# array (missing_component_behavior is "empty" by default); webdataset leaves out the key.
#
# Seen on 2026-11-30: 4 samples of 2, by both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet nvidia-dali-cuda130==2.4.0 nvidia-nvimgcodec-cu13==0.9.0.20 numpy==2.4.6 webdataset==1.0.2
venv/bin/python - <<'END'
import io
import tarfile

import numpy as np
import webdataset
from nvidia.dali import fn, pipeline_def

with tarfile.open("a.tar", "w") as tar:
    for suffix in ("bin", "cls"):
        for row in range(2):
            data = f"{suffix} {row}".encode()
            member = tarfile.TarInfo(f"{row}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pipeline_def(batch_size=4, num_threads=1, device_id=None)
def graph():
    return tuple(fn.readers.webdataset(paths=["a.tar"], ext=["bin", "cls"], name="reader"))


pipeline = graph()
pipeline.build()
outputs = pipeline.run()
dali = [tuple(bytes(np.asarray(output.at(row))) for output in outputs) for row in range(4)]
count = pipeline.reader_meta("reader")["epoch_size"]
others = [
    (sample.get("bin", b""), sample.get("cls", b""))
    for sample in webdataset.WebDataset("a.tar", shardshuffle=False)
]
expected = [(b"bin 0", b""), (b"bin 1", b""), (b"", b"cls 0"), (b"", b"cls 1")]
print("DALI:", count, dali)
print("webdataset:", others)
assert count == 4 and dali == expected, dali
assert others == expected, others
END
