"""What `cmake --install` gives an app: both libraries, headers that are plain C, find_package and pkg-config."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.bundled import MODEL
from support.native import SOURCE, build, call, documented_names, exported_names, install, onnxruntime_library, tool

from fbiedge import cli, ops_library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names, links and nm's letters are those of Linux")
HEADERS = ("fbiedge_ops.h", "fbiedge_register.h")
VERSION = ops_library.version()
ABI = ".".join(VERSION.split(".")[:2])  # until 1.0, when the first number will do
C99 = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wstrict-prototypes", "-Werror")
# y = a · W_effᵀ of a 1 x 2 matrix of signs + and -, with scales of 3 and 3: 3 · 5 - 3 · 7.
PROGRAM = r"""
#include <fbiedge_ops.h>
#include <stdio.h>

int main(void) {
    const float weight[2] = {1.0f, -1.0f}, scales[2] = {3.0f, 3.0f}, a[2] = {5.0f, 7.0f};
    float y = 0.0f;
    uint8_t tiles[64];
    fbiedge_matmul_args args = {0};
    int status = fbiedge_pack(weight, 1, 2, tiles, sizeof tiles);
    if (status != FBIEDGE_OK) return 1;
    args.struct_bytes = sizeof args;
    args.accuracy_level = FBIEDGE_FP32;
    args.scale_form = FBIEDGE_COLUMN;
    args.m = args.n = 1;
    args.k = 2;
    args.a = a;
    args.b = tiles;
    args.scales = scales;
    args.y = &y;
    status = fbiedge_matmul(&args);
    printf("%s %s %g\n", fbiedge_version(), fbiedge_status_message(status), y);
    return status;
}
"""
OUTPUT = f"{VERSION} ok -6\n"


@pytest.fixture(scope="module")
def renamed(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another prefix, where the entry point has another name; only one file is compiled again."""
    option = "-DFBIEDGE_REGISTER_FUNCTION=RegisterFbiedgeOps"
    return install(installed.parent / "build", tmp_path_factory.mktemp("renamed"), option)


def pkg_config(prefix: Path, *options: str) -> list[str]:
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config (Debian: apt-get install pkg-config)")
    return call("pkg-config", *options, "fbiedge_ops", env={"PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig")}).split()


def test_the_files(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if not path.is_dir()}
    libraries = {f"lib/libfbiedge_ops.{end}" for end in ("a", "so", f"so.{ABI}", f"so.{VERSION}")}
    package = {"-config.cmake", "-config-version.cmake", "-targets.cmake", "-targets-release.cmake"}
    assert names == libraries | {f"include/{name}" for name in HEADERS} | {"lib/pkgconfig/fbiedge_ops.pc"} | {
        f"lib/cmake/fbiedge_ops/fbiedge_ops{end}" for end in package
    }
    assert f"[libfbiedge_ops.so.{ABI}]" in call("readelf", "-d", installed / "lib/libfbiedge_ops.so")


def test_the_shared_library_exports_what_is_documented(installed: Path, renamed: Path) -> None:
    names = documented_names()
    assert exported_names(installed / "lib/libfbiedge_ops.so") == names | {"RegisterCustomOps"}
    assert exported_names(renamed / "lib/libfbiedge_ops.so") == names | {"RegisterFbiedgeOps"}


def test_the_static_library_defines_only_names_of_its_own(installed: Path) -> None:
    """Beside the documented ones those of namespace fbiedge, and copies of the C++ library's that a linker merges."""
    listing = call(tool("nm"), "--defined-only", "--extern-only", installed / "lib/libfbiedge_ops.a")
    symbols = [line.split()[1:] for line in listing.splitlines() if len(line.split()) == 3]
    strong = {name for kind, name in symbols if kind not in "WVu"}
    assert {name for name in strong if not re.match(r"_Z\w*7fbiedge", name)} == documented_names() | {
        "RegisterCustomOps"
    }


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("compiler", [("gcc", "-xc", *C99), ("g++", "-xc++", "-std=c++11", *C99[1:4], "-Werror")])
def test_the_headers_alone_compile_as_c_and_cpp(installed: Path, name: str, compiler: tuple[str, ...]) -> None:
    """No type of C++ or of ONNX Runtime's header is needed to know the interface."""
    source = f"#include <{name}>\n"
    command = [tool(compiler[0]), *compiler[1:], "-fsyntax-only", f"-I{installed}/include", "-"]
    done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_macros_are_the_librarys_version() -> None:
    text = (SOURCE / "include/fbiedge_ops.h").read_text()
    macros = dict(re.findall(r"#define FBIEDGE_VERSION(\w*) \"?([\d.]+)\"?\n", text))
    assert macros[""] == VERSION == ".".join(macros[f"_{part}"] for part in ("MAJOR", "MINOR", "PATCH"))


def test_a_c_program_by_pkg_config(installed: Path, tmp_path: Path) -> None:
    """Also after the installation was moved, and linked with the static library by a C compiler."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(installed, moved, symlinks=True)
    source = tmp_path / "program.c"
    source.write_text(PROGRAM)
    assert pkg_config(moved, "--modversion") == [VERSION]
    shared, static = tmp_path / "shared", tmp_path / "static"
    call(tool("gcc"), *C99, source, "-o", shared, *pkg_config(moved, "--cflags", "--libs"), f"-Wl,-rpath,{moved}/lib")
    assert call(shared) == OUTPUT
    flags = pkg_config(moved, "--static", "--cflags", "--libs")
    assert flags.count("-lfbiedge_ops") == 1
    flags[flags.index("-lfbiedge_ops")] = "-l:libfbiedge_ops.a"
    call(tool("gcc"), *C99, source, "-o", static, *flags)
    assert call(static) == OUTPUT
    assert "libfbiedge_ops" not in call("readelf", "-d", static)


# Two programs, with either library.
PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(app {language})
{library}
foreach(name fbiedge_ops static)
  add_executable(with_${{name}} {source})
  target_link_libraries(with_${{name}} PRIVATE fbiedge_ops::${{name}})
endforeach()
"""


def test_a_c_project_by_find_package(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "program.c").write_text(PROGRAM)
    found = PROJECT.format(language="C", library="find_package(fbiedge_ops REQUIRED)", source="program.c")
    (tmp_path / "CMakeLists.txt").write_text(found)
    folder = build(tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}", source=tmp_path)
    assert call(folder / "with_fbiedge_ops") == call(folder / "with_static") == OUTPUT


def test_a_project_that_adds_the_folder(tmp_path: Path) -> None:
    """It finds headers and libraries, and installs nothing of ours. The library isn't compiled once more for this."""
    (tmp_path / "program.cc").write_text(PROGRAM)
    added = PROJECT.format(language="CXX", library=f"add_subdirectory({SOURCE} ops)", source="program.cc")
    (tmp_path / "CMakeLists.txt").write_text(added)
    folder = build(tmp_path / "build", source=tmp_path, target="CMakeFiles/with_static.dir/program.cc.o")
    commands = call(tool("ninja"), "-C", folder, "-t", "commands", "with_static", "with_fbiedge_ops")
    assert re.search(r"-o with_static +ops/libfbiedge_ops\.a ", commands)
    assert re.search(r"-o with_fbiedge_ops .*ops/libfbiedge_ops\.so", commands)
    call(tool("cmake"), "--install", folder, "--prefix", tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()


@pytest.mark.parametrize(("wanted", "found"), [(ABI, 1), (VERSION, 1), ("0.0", 0), ("0.9999", 0), ("1.0", 0)])
def test_only_a_compatible_version_is_found(installed: Path, tmp_path: Path, wanted: str, found: int) -> None:
    """Until 1.0 a minor version may change the interface."""
    script = f'find_package(fbiedge_ops {wanted} QUIET)\nmessage("found: ${{fbiedge_ops_FOUND}}")\n'
    (tmp_path / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.18)\nproject(app CXX)\n{script}")
    output = call(tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    assert f"found: {found}\n" in output


def test_where_only_the_static_library_was_built_it_is_the_one(renamed: Path, installed: Path, tmp_path: Path) -> None:
    prefix = install(installed.parent / "build", tmp_path / "prefix", "-DFBIEDGE_BUILD_SHARED=OFF")
    assert [path.name for path in (prefix / "lib").glob("lib*")] == ["libfbiedge_ops.a"]
    (tmp_path / "program.c").write_text(PROGRAM)
    found = PROJECT.format(language="C", library="find_package(fbiedge_ops REQUIRED)", source="program.c")
    (tmp_path / "CMakeLists.txt").write_text(found)
    folder = build(tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}", source=tmp_path)
    assert call(folder / "with_fbiedge_ops") == OUTPUT


def test_two_libraries_with_entry_points_of_different_names_in_one_program(
    installed: Path, renamed: Path, tmp_path: Path
) -> None:
    """As on iOS, where every op library is linked statically and found by name. Here both are ours, built twice."""
    source, program = tmp_path / "names.c", tmp_path / "names"
    source.write_text(NAMES)
    abi, onnxruntime = SOURCE / "src/ort/abi", tmp_path / "libonnxruntime.so.1"  # the name that the program looks for
    onnxruntime.symlink_to(onnxruntime_library())
    libraries = [prefix / "lib/libfbiedge_ops.a" for prefix in (renamed, installed)]
    pull = ["-Wl,-u,RegisterFbiedgeOps", "-Wl,-u,RegisterCustomOps"]  # nothing else in the program refers to them
    call(tool("gcc"), *C99, f"-I{abi}", source, "-o", program, "-rdynamic", *pull, *libraries, onnxruntime,
         f"-Wl,-rpath,{tmp_path}", "-lstdc++", "-lm", "-pthread")  # fmt: skip
    assert call(program, MODEL, "RegisterFbiedgeOps", "RegisterCustomOps") == "RegisterFbiedgeOps\nRegisterCustomOps\n"


# Opens a model once with each registration function, by name.
NAMES = r"""
#include <onnxruntime_c_api.h>
#include <stdio.h>

int main(int count, char** arguments) {
    const OrtApi* ort = OrtGetApiBase()->GetApi(18);
    OrtEnv* env = NULL;
    int i;
    if (ort->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "names", &env)) return 1;
    for (i = 2; i < count; ++i) {
        OrtSessionOptions* options = NULL;
        OrtSession* session = NULL;
        OrtStatus* status = ort->CreateSessionOptions(&options);
        if (!status) status = ort->RegisterCustomOpsUsingFunction(options, arguments[i]);
        if (!status) status = ort->CreateSession(env, arguments[1], options, &session);
        puts(status ? ort->GetErrorMessage(status) : arguments[i]);
        ort->ReleaseSession(session);
        ort->ReleaseSessionOptions(options);
    }
    ort->ReleaseEnv(env);
    return 0;
}
"""


def test_the_python_package_holds_the_headers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["library", "--include"]) == 0
    assert capsys.readouterr().out == f"{ops_library.include_path()}\n"
    for name in HEADERS:
        assert (ops_library.include_path() / name).read_bytes() == (SOURCE / "include" / name).read_bytes()


def test_library_answers_one_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["library", "--include", "--isa"]) == 2
    assert "expected one of them" in capsys.readouterr().err
