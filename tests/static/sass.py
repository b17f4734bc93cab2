"""Machine code of compiled kernels, counted: what `nvdisasm` prints of a cubin.

Counts are of instructions as they stand in the code, not of how often they run; loops are unrolled by the compiler, so
they compare versions of a kernel and not kernels with each other.
"""

import itertools
import re
import struct
import subprocess
from collections import Counter
from pathlib import Path

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_DOUBLE = re.compile(r"D(ADD|MUL|FMA|MNMX|SETP)\b|(F2F|I2F|F2I|FRND)\S*\.F64|MUFU\.\w+64H")
_REGISTER = re.compile(r"\bR\d+")
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_MATRIX = re.compile(r"[HI]MMA\b|HGMMA|UTC\w*MMA|Q\w*MMA")
WIDTHS = (16, 8, 4, 2, 1)
BYTES = 16  # of an instruction, from Volta on


def parse(text):
    """(opcode with its suffixes, operands) of every instruction of a listing, in order."""
    return [(opcode, operands.strip()) for opcode, operands in _LINE.findall(text)]


def codes(cubin):
    """{kernel: its instructions as they are encoded} of a cubin, an ELF file."""
    (at,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, begin, length in sections:
        section = cubin[(first := sections[names][4] + name) : cubin.index(b"\0", first)].decode()
        if section.startswith(".text."):
            found[section.removeprefix(".text.")] = cubin[begin : begin + length]
    return found


def code(cubin):
    """The instructions of a cubin with one kernel."""
    (found,) = codes(cubin).values()
    return found


def listings(tool, arch, codes, directory):
    """The instructions of each of `codes`. `tool` needs tenths of a second to start, so it reads all of them as one;
    targets of branches are counted from the kernel's first instruction."""
    file = Path(directory, f"{arch}.bin")
    file.write_bytes(b"".join(codes))
    command = [tool, "-b", f"SM{arch}{'a' * (arch >= 90)}", str(file)]
    found = iter(parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    each, begin = [], 0
    for part in codes:
        listing = list(itertools.islice(found, len(part) // BYTES))
        assert len(listing) == len(part) // BYTES
        each.append([(opcode, _from(begin, opcode, operands)) for opcode, operands in listing])
        begin += len(part)
    assert not list(found)
    return each


def _from(begin, opcode, operands):
    target = _TARGET.search(operands) if opcode.startswith("BRA") else None
    return f"{operands[: target.start()]}0x{int(target[1], 16) - begin:x}" if target else operands


def loops(listing):
    """(first, last) instruction of each loop that has none inside."""
    found = set()
    for last, (opcode, operands) in enumerate(listing):
        target = _TARGET.search(operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) // BYTES < last:
            found.add((int(target[1], 16) // BYTES, last))
    return sorted(a for a in found if not any(a[0] <= b[0] and b[1] <= a[1] for b in found - {a}))


def width(opcode):
    """Bytes that one thread moves by a load or store."""
    suffixes = opcode.split(".")
    named = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((named[s] for s in suffixes if s in named), 4)


def fused_into_lanes(listing):
    """How many fused multiply-adds add a product of a lane to what another lane has sent.

    A sum over lanes adds in pairs. Where both sum their rounded values the result is the same in both lanes; where each
    adds its own exact product to the other's rounded one, it is not.
    """
    sent, found = set(), 0
    for opcode, operands in listing:
        names = [match[0] if (match := _REGISTER.search(operand)) else None for operand in operands.split(",")]
        if opcode.startswith("SHFL.BFLY"):
            sent.add(names[1])
            continue
        if opcode.split(".")[0] == "FFMA" and len(names) > 3 and names[3] in sent:
            found += 1
        if names[0]:  # a wide result takes registers after it too
            first = int(names[0][1:])
            wide = opcode.startswith(("LD", "CS2R")) or ".WIDE" in opcode
            sent.difference_update(f"R{first + i}" for i in range(4 if wide else 1))
    return found


def loads_in_flight(listing):
    """The most loads of global memory that have been issued while nothing has read their results, in code without a
    branch. They come back in order: who reads a result has waited for the loads before it too."""
    waiting, most = [], 0  # registers of each load
    for opcode, operands in listing:
        name, (first, *rest) = opcode.split(".")[0], operands.split(",")
        written = _REGISTER.match(first)
        read = {
            register for operand in (rest if written else [first, *rest]) for register in _REGISTER.findall(operand)
        }
        arrived = max((i + 1 for i, registers in enumerate(waiting) if read & registers), default=0)
        waiting = [] if name in ("BRA", "BAR", "EXIT") else waiting[arrived:]
        if name in ("LDG", "LD") and written:
            begin = int(written[0][1:])
            waiting.append({f"R{begin + i}" for i in range(max(width(opcode) // 4, 1))})
            most = max(most, len(waiting))
    return most


def counts(listing):
    """The row of a kernel: instructions, those in double precision, loads and stores of global memory by width."""
    opcodes = Counter(opcode for opcode, _ in listing if opcode != "NOP")
    row = {"instructions": sum(opcodes.values()), "fused_into_lanes": fused_into_lanes(listing)}
    row["in_flight"] = loads_in_flight(listing)
    row["matrix"] = sum(n for opcode, n in opcodes.items() if _MATRIX.match(opcode))
    row["loop"] = max((last - first + 1 for first, last in loops(listing)), default=0)
    row["double"] = sum(n for opcode, n in opcodes.items() if _DOUBLE.match(opcode))
    for name, wanted in (("loads", ("LDG", "LDGSTS", "LD")), ("stores", ("STG", "ST"))):
        row[name] = [
            sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in wanted and width(opcode) == size)
            for size in WIDTHS
        ]
    row["generic"] = sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in ("LD", "ST"))
    return row


def table(results, more=()):
    """One line for each kernel and architecture. `results`: rows with "kernel", "arch", "registers", "stack", "shared"
    and the counts, of which `more` are shown too; of its variants the counts are added up, of the resources, and of the
    longest loop without a loop inside, stands the largest."""
    groups = {}
    for result in results:
        groups.setdefault((result["kernel"], result["arch"]), []).append(result)
    width = max(27, *(len(kernel) + 1 for kernel, _ in groups))
    lines = [
        f"{'kernel':{width}}{'sm':>4}{'variants':>9}{'instr':>7}{'regs':>5}{'stack':>6}{'shared':>7}{'fp64':>5}{'lanes':>6}"
        f"{'flight':>7}{''.join(f'{name:>8}' for name in more)}  {'loads of 16/8/4/2/1 bytes':27}stores"
    ]
    for (kernel, arch), rows in sorted(groups.items()):
        total = {name: sum(row[name] for row in rows) for name in ("instructions", "double", "fused_into_lanes", *more)}
        most = {name: max(row[name] for row in rows) for name in ("registers", "stack", "shared", "in_flight", "loop")}
        moved = ["/".join(str(sum(n)) for n in zip(*(row[name] for row in rows))) for name in ("loads", "stores")]
        lines.append(
            f"{kernel:{width}}{arch:>4}{len(rows):>9}{total['instructions']:>7}{most['registers']:>5}{most['stack']:>6}"
            f"{most['shared']:>7}{total['double']:>5}{total['fused_into_lanes']:>6}"
            f"{most['in_flight']:>7}{''.join(f'{(total | most)[name]:>8}' for name in more)}  {moved[0]:27}{moved[1]}"
        )
    return "\n".join(lines)
