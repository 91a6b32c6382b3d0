#!/usr/bin/env python3
"""Build empty CANN libraries, so that the real torch_npu wheel can be imported on a machine without CANN and without an NPU.

    python cann_stub.py OUT_DIR          # run by the interpreter that has torch and torch_npu

Every symbol that the wheel's libraries want and that nobody provides is defined in one shared library: C functions return 0, the few that
hand something out do so from plain memory, anything that would run a kernel returns an error. No device code is imitated.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

HOLDER = "libascendcl.so"
EMPTY = (
    "libhccl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so", "libfmk_parser.so",
    "libascend_protobuf.so",
)  # fmt: skip
SYSTEM = (
    "libstdc++.so.6", "libm.so.6", "libc.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2",
)  # fmt: skip
FOLDERS = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64")

# functions that torch_npu looks up by name at run time; some other names it looks up are feature probes and must stay absent
LOOKED_UP = """
aclrtSetDeviceSatMode aclrtSetOpExecuteTimeOut aclrtSetOpExecuteTimeOutV2 aclrtSetOpWaitTimeout aclSetCompileopt aclrtSetSysParamOpt
aclrtCtxSetSysParamOpt aclrtSynchronizeDevice aclrtSynchronizeDeviceWithTimeout aclrtSetStreamOverflowSwitch
aclrtGetStreamOverflowSwitch aclrtSetStreamFailureMode aclrtDestroyStreamForce aclrtPeekAtLastError aclrtGetLastError
aclrtSubscribeReport aclrtUnSubscribeReport aclrtLaunchCallback aclrtStreamQuery aclrtSetStreamResLimit aclrtResetStreamResLimit
aclrtUseStreamResInCurrentThread aclrtUnuseStreamResInCurrentThread aclrtSetDeviceResLimit aclrtResetDeviceResLimit
aclrtSetStreamAttribute aclrtMemsetAsync
""".split()

ALLOC = "return posix_memalign(out, 512, size ? size : 512) ? 100000 : 0;"
HANDLE = "*out = malloc(64); return 0;"
# name -> (return type, parameters, body)
BODIES: dict[str, tuple[str, str, str]] = {
    "aclrtGetSocName": ("const char*", "", 'return "Ascend910B1";'),
    "aclGetRecentErrMsg": ("const char*", "", 'return "CANN stub";'),
    "vsnprintf_s": ("int", "char* to, size_t n, size_t, const char* format, va_list rest", "return vsnprintf(to, n, format, rest);"),
    "snprintf_s": (
        "int", "char* to, size_t n, size_t, const char* format, ...",
        "va_list rest; va_start(rest, format); int r = vsnprintf(to, n, format, rest); va_end(rest); return r;",
    ),
    "strcpy_s": (
        "int", "char* to, size_t n, const char* from",
        "if (!to || !n) return 22; strncpy(to, from, n - 1); to[n - 1] = 0; return 0;",
    ),
    "aclrtGetDeviceCount": ("int", "uint32_t* out", "*out = 1; return 0;"),
    "aclrtGetDevice": ("int", "int32_t* out", "*out = 0; return 0;"),
    "aclrtGetMemInfo": ("int", "int, size_t* free, size_t* total", "*free = *total = (size_t)64 << 30; return 0;"),
    "aclrtMalloc": ("int", "void** out, size_t size, int", ALLOC),
    "aclrtMallocHost": ("int", "void** out, size_t size", ALLOC),
    "aclrtFree": ("int", "void* p", "free(p); return 0;"),
    "aclrtFreeHost": ("int", "void* p", "free(p); return 0;"),
    "aclrtCreateStream": ("int", "void** out", HANDLE),
    "aclrtCreateStreamWithConfig": ("int", "void** out, uint32_t, uint32_t", HANDLE),
    "aclrtCreateEventWithFlag": ("int", "void** out, uint32_t", HANDLE),
    "aclrtCreateEventExWithFlag": ("int", "void** out, uint32_t", HANDLE),
    "aclrtGetCurrentContext": ("int", "void** out", "static char context[64]; *out = context; return 0;"),
    "aclrtGetPrimaryCtxState": ("int", "int, uint32_t* flags, int32_t* active", "if (flags) *flags = 0; *active = 1; return 0;"),
    "aclrtMemcpy": ("int", "void* to, size_t, const void* from, size_t n, int", "memcpy(to, from, n); return 0;"),
    "aclrtMemcpyAsync": ("int", "void* to, size_t, const void* from, size_t n, int, void*", "memcpy(to, from, n); return 0;"),
    "aclrtMemset": ("int", "void* to, size_t, int value, size_t n", "memset(to, value, n); return 0;"),
    "aclGetDeviceCapability": ("int", "uint32_t, int, int64_t* out", "*out = 24; return 0;"),
    "aclGetCompileoptSize": ("size_t", "int", "return 8;"),
    "aclGetCompileopt": ("int", "int, char* to, size_t n", 'if (n) strncpy(to, "0", n); return 0;'),
    "aclrtQueryEventStatus": ("int", "void*, int* out", "*out = 1; return 0;"),
    "aclrtQueryEventWaitStatus": ("int", "void*, int* out", "*out = 1; return 0;"),
    "aclrtGetSysParamOpt": ("int", "int, int64_t* out", "*out = 0; return 0;"),
    "aclrtGetStreamResLimit": ("int", "void*, int, uint32_t* out", "*out = 24; return 0;"),
    "aclrtGetDeviceResLimit": ("int", "int, int, uint32_t* out", "*out = 24; return 0;"),
    "aclrtGetResInCurrentThread": ("int", "int, uint32_t* out", "*out = 24; return 0;"),
    "aclrtStreamGetId": ("int", "void* stream, int32_t* out", "*out = (int32_t)((uintptr_t)stream >> 4); return 0;"),
    "MsprofSysCycleTime": ("uint64_t", "", "static uint64_t t; return ++t;"),
    # an error, or an op on real npu tensors would seem to have run and leave its output as it was
    "aclopCompileAndExecute": ("int", "...", "return 100000;"),
    "aclopCompileAndExecuteV2": ("int", "...", "return 100000;"),
}  # fmt: skip
# C++ functions that return a class by value get the address to fill first: these must be zeroed, by so many bytes
BY_VALUE = {
    "GetShape() const": 16, "GetTensorDesc() const": 16, "GetCompiledGraphSummary": 16, "CreateOperator": 16, "GEGetWarningMsgV2": 16,
    "GetDims() const": 24, "GetAllNodes": 24, "GEGetErrorMsg": 32,
}  # fmt: skip
HEAD = "#include <cstdarg>\n#include <cstdint>\n#include <cstdio>\n#include <cstdlib>\n#include <cstring>\n"


def symbols(library: Path, which: str) -> dict[str, str]:
    """{name without its version: type letter} of the dynamic symbols of a library; `which`: defined-only or undefined-only."""
    lines = subprocess.run(["nm", "-D", f"--{which}", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {parts[-1].split("@")[0]: parts[-2] for parts in map(str.split, lines) if len(parts) >= 2}


def site() -> Path:
    return Path(sysconfig.get_paths()["platlib"])


def missing() -> list[str]:
    """What the wheel's libraries want and neither torch, nor the wheel, nor the system has."""
    import torch

    wheel = site() / "torch_npu"
    wants = [
        wheel / "lib/libtorch_npu.so", wheel / "lib/libtensorpipe.so", wheel / "lib/libnpu_profiler.so", *wheel.glob("_C*.so"),
        *sorted((wheel / "dynamo/torchair/core").glob("*.so")),
    ]  # fmt: skip
    folder = Path(torch.__file__).parent
    system = [Path(f) / lib for lib in SYSTEM for f in FOLDERS if (Path(f) / lib).exists()]
    has = {s for lib in (*(folder / "lib").glob("*.so*"), *folder.glob("_C*.so"), *wants, *system) for s in symbols(lib, "defined-only")}
    wanted = {s: kind for lib in wants for s, kind in symbols(lib, "undefined-only").items()}
    return sorted(s for s, kind in wanted.items() if s not in has and kind not in "wv" and not s.startswith(("Py", "_Py")))


def demangled(names: list[str]) -> list[str]:
    return subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()


def cxx_body(name: str) -> str:
    """What a C++ function does: constructors and functions returning by value zero what they are to fill."""
    path = name.split("(")[0].split("::")
    if len(path) > 1 and path[-1].split("[")[0] == path[-2]:
        return "memset(to, 0, 16); return to;"
    size = next((n for text, n in BY_VALUE.items() if text in name), 0)
    if size:
        return f"memset(to, 0, {size}); return to;"
    if "OperatorFactory::IsExistOp" in name:
        return "return (void*)1;"
    return 'return (void*)"";' if name.startswith("ge::AscendString::GetString") else "return 0;"


def source(names: list[str]) -> str:
    """One C++ file that defines all of them."""
    c = [n for n in names if not n.startswith("_Z")]
    cxx = [n for n in names if n.startswith("_Z")]
    out = [HEAD, 'extern "C" {']
    out += [f"{kind} {n}({args}) {{ {body} }}" for n, (kind, args, body) in BODIES.items()]
    out += [f"long {n}() {{ return 0; }}" for n in dict.fromkeys((*c, *LOOKED_UP)) if n not in BODIES]
    for i, (mangled, name) in enumerate(zip(cxx, demangled(cxx))):
        out.append(f'void* cxx_{i}(void* to) asm("{mangled}"); void* cxx_{i}(void* to) {{ (void)to; {cxx_body(name)} }}')
    return "\n".join([*out, "}", ""])


def build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    code = folder / "stub.cpp"
    code.write_text(source(missing()))
    shared = ["-fPIC", "-shared", "-w"]
    subprocess.check_call(["g++", "-O1", *shared, "-o", str(folder / HOLDER), str(code), f"-Wl,-soname,{HOLDER}"])
    for name in EMPTY:  # each an empty library that pulls the full one in
        empty = folder / "empty.c"
        empty.write_text("int stub_" + "".join(ch if ch.isalnum() else "_" for ch in name) + ";\n")
        link = ["-Wl,--no-as-needed", f"-Wl,-soname,{name}", str(folder / HOLDER), "-Wl,-rpath,$ORIGIN"]
        subprocess.check_call(["gcc", *shared, "-o", str(folder / name), str(empty), *link])


if __name__ == "__main__":
    build(Path(sys.argv[1]))
