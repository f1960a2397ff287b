"""Run a compilation and keep what ptxas says of each kernel: registers, shared memory, spills.

    keep_report.py FOLDER nvcc ... -o launch.cu.o        writes FOLDER/launch.cu.txt

CMake puts this in front of nvcc. What the compiler says besides goes to stderr as ever.
"""

import subprocess
import sys
from pathlib import Path

folder, command = Path(sys.argv[1]), sys.argv[2:]
done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
output = Path(command[command.index("-o") + 1])
folder.mkdir(parents=True, exist_ok=True)
(folder / f"{output.stem}.txt").write_text(done.stderr)
report = ("ptxas info", "    ")  # the indented lines go on with what an info line began
for line in done.stderr.splitlines():
    if done.returncode or not line.startswith(report):
        print(line, file=sys.stderr)
sys.exit(done.returncode)
