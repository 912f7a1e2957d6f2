"""What a compiled kernel takes of a GPU, read from its machine code without one.

Source: cuobjdump and nvdisasm, which come with triton; CUDA's programming guide for the limits.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton.backends.nvidia import compiler as nvidia

from unimo3.kernels.cross_layer_attention.blocks import Blocks

# Limits of a multiprocessor; 80 stands for all of 8.x. CUDA keeps 1 KiB of shared memory a block.
SM_BYTES = {80: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SM_REGISTERS, SM_WARPS, SM_BLOCKS = 65536, 64, 32
_MATRIX_INSTRUCTION = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_LABEL = re.compile(r"^\s*\.(L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\(\.(L_x_\d+)\)")


@dataclass(frozen=True)
class Resources:
    """Of a compiled kernel.

    Attributes:
        registers: of a thread.
        local_bytes: of a thread: what did not fit its registers.
        shared_bytes: of a block of threads.
        matrix_instructions: in the machine code, for tensor cores.
        loop_instructions: of all innermost loops with a product, once through each.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    matrix_instructions: int
    loop_instructions: int

    def slots(self, blocks: Blocks) -> float:
        """Issue slots of a scheduler for 64 queries by 64 keys of a level: what all warps issue, by four schedulers."""
        return self.loop_instructions * blocks.warps / 4 * 64 * 64 / (blocks.queries * blocks.keys)

    def resident_warps(self, capability: int, warps: int) -> int:
        """Warps resident on a multiprocessor at once; registers are allocated by 256 a warp."""
        warp_registers = -(-self.registers * 32 // 256) * 256
        blocks = min(
            SM_REGISTERS // (warp_registers * warps),
            SM_BYTES[capability] // (self.shared_bytes + 1024),
            SM_WARPS // warps,
            SM_BLOCKS,
        )
        return blocks * warps


def read_resources(cubin: bytes, shared_bytes: int) -> Resources:
    """Of a binary; `shared_bytes` is known to triton alone."""
    tools = Path(nvidia.__file__).parent / "bin"

    def read(tool: str, *options: str) -> str:
        return subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = read("cuobjdump", "--dump-resource-usage")
        code = read("nvdisasm", "-c", "-ndf")  # without dataflow analysis, which is not read
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|LOCAL|STACK):(\d+)", usage)}
    count = len(_MATRIX_INSTRUCTION.findall(code))
    return Resources(numbers["REG"], numbers["LOCAL"] + numbers["STACK"], shared_bytes, count, _in_loops(code))


def _in_loops(code: str) -> int:
    """Instructions of innermost loops with a product; a loop ends with a branch to a label before it."""
    lines = code.splitlines()
    labels = {match[1]: index for index, line in enumerate(lines) if (match := _LABEL.match(line))}
    ends = {index: labels.get(match[1], index) for index, line in enumerate(lines) if (match := _BRANCH.search(line))}
    loops = {(start, end) for end, start in ends.items() if start < end}
    outer = {one for one in loops for other in loops if one != other and one[0] <= other[0] and other[1] <= one[1]}
    bodies = [lines[start : end + 1] for start, end in loops - outer]
    # Float32 has no matrix instructions: its products are the multiplications and additions.
    with_product = [body for body in bodies if any(_MATRIX_INSTRUCTION.search(x) or " FFMA" in x for x in body)]
    return sum(_INSTRUCTION.match(line) is not None for body in with_product for line in body)
