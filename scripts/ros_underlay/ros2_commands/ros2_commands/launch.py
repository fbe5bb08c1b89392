# SPDX-License-Identifier: Apache-2.0
"""`ros2 launch PACKAGE FILE [name:=value …]` or `ros2 launch PATH [name:=value …]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import launch
from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import AnyLaunchDescriptionSource
from ros2cli.command import CommandExtension


def find_launch_file(package_or_path: str, rest: list[str]) -> tuple[Path, list[str]]:
    """Splits the positional arguments into the launch file and what follows it. Raises RuntimeError."""
    path = Path(package_or_path)
    if path.is_file():
        return path.resolve(), rest
    if "/" in package_or_path:
        raise RuntimeError(f"no launch file at '{package_or_path}'")
    if not rest:
        raise RuntimeError(f"'{package_or_path}' is no file; to launch from a package: ros2 launch PACKAGE FILE")
    try:
        share = Path(get_package_share_directory(package_or_path))
    except PackageNotFoundError:
        raise RuntimeError(f"package '{package_or_path}' is not installed, or its setup file is not sourced") from None
    name, *arguments = rest
    found = sorted(p for p in share.rglob(name) if p.is_file())
    if not found:
        raise RuntimeError(f"no launch file '{name}' below {share}")
    if len(found) > 1:
        raise RuntimeError(f"more than one '{name}': {', '.join(map(str, found))}; give the path")
    return found[0], arguments


def parse_launch_arguments(arguments: list[str]) -> list[tuple[str, str]]:
    """Splits `name:=value`; the last one of a name wins. Raises RuntimeError."""
    values: dict[str, str] = {}
    for argument in arguments:
        name, separator, value = argument.partition(":=")
        if not separator or not name:
            raise RuntimeError(f"malformed launch argument '{argument}', expected 'name:=value'")
        values[name] = value
    return list(values.items())


def format_arguments(description: launch.LaunchDescription) -> str:
    declared = description.get_launch_arguments()
    if not declared:
        return "No arguments."
    lines = ["Arguments (pass arguments as '<name>:=<value>'):"]
    for argument in declared:
        lines += ["", f"    '{argument.name}':", f"        {argument.description or 'no description given'}"]
        if argument.choices is not None:
            lines.append(f"        Valid choices are: {argument.choices}")
        if argument.default_value is None:
            lines.append("        (required)")
        else:
            default = " + ".join(part.describe() for part in argument.default_value) or "''"
            lines.append(f"        (default: {default})")
    return "\n".join(lines)


class LaunchCommand(CommandExtension):
    """Run a launch file."""

    def add_arguments(self, parser: argparse.ArgumentParser, cli_name: str) -> None:
        parser.add_argument("-n", "--noninteractive", action="store_true", help="assume no terminal")
        parser.add_argument("-d", "--debug", action="store_true", help="log what launch does inside")
        parser.add_argument(
            "-p",
            "--print",
            "--print-description",
            dest="print_description",
            action="store_true",
            help="print the launch description without running it",
        )
        parser.add_argument(
            "-s",
            "--show-args",
            "--show-arguments",
            dest="show_arguments",
            action="store_true",
            help="print the arguments that the launch file takes",
        )
        parser.add_argument(
            "-a",
            "--show-all-subprocesses-output",
            dest="show_all_output",
            action="store_true",
            help="show the output of all processes on the terminal",
        )
        parser.add_argument("package_or_path", help="name of a package, or path of a launch file")
        parser.add_argument(
            "rest",
            nargs="*",
            metavar="FILE|name:=value",
            help="launch file of the package, then launch arguments",
        )

    def main(self, *, parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
        path, rest = find_launch_file(args.package_or_path, args.rest)
        arguments = parse_launch_arguments(rest)
        source = AnyLaunchDescriptionSource(str(path))
        if args.show_arguments or args.print_description:
            context = launch.LaunchContext(argv=rest)
            description = source.get_launch_description(context)
            if args.show_arguments:
                print(format_arguments(description))
            else:
                print(launch.LaunchIntrospector().format_launch_description(description))
            return 0
        actions: list[launch.LaunchDescriptionEntity] = []
        if args.show_all_output:
            actions.append(launch.actions.SetEnvironmentVariable("OVERRIDE_LAUNCH_PROCESS_OUTPUT", "both"))
        actions.append(IncludeLaunchDescription(source, launch_arguments=arguments))
        service = launch.LaunchService(argv=rest, noninteractive=args.noninteractive, debug=args.debug)
        service.include_launch_description(launch.LaunchDescription(actions))
        return service.run()
