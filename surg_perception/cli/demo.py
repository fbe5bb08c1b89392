# SPDX-License-Identifier: Apache-2.0
"""`surg-perception demo`: the real launch file on the phantom or a video, watched, with questions, then tables."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

DURATION_S = 35.0
START_LIMIT_S = 60.0
SHORT_FILTER = """/**/phase:
  ros__parameters:
    filter.time_constant_s: 0.2
    filter.hold_s: 0.1
"""


def run(video: str | None, out: Path) -> int:
    """Launch the pipeline, watch it, stop it. Returns the exit status; 0 when images were processed."""
    console = Console()
    if shutil.which("ros2") is None or not os.environ.get("AMENT_PREFIX_PATH"):
        console.print(
            "ROS 2 is not in this shell's environment: `source setup.bash` in the project's folder first "
            "(or use `make demo`, which does)",
            style="red",
        )
        return 2
    if video is not None and not Path(video).expanduser().exists():
        console.print(f"there is no video {video}", style="red")
        return 2
    source = str(Path(video).expanduser().resolve()) if video else "phantom"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    overlay = (out / "overlay.png").resolve()
    log_path = out / "launch.log"
    command = [
        *("ros2", "launch", "surg_perception", "pipeline.launch.py"),
        f"source:={source}",
        f"overlay_image:={overlay}",
        f"overlay_video:={overlay.with_suffix('.mp4')}",
    ]
    if video is None:
        # A whole operation in half a minute: the filter's times are shortened with it.
        command += [f"source_duration_s:={DURATION_S}", f"params_file:={out.resolve() / 'params.yaml'}"]
        (out / "params.yaml").write_text(SHORT_FILTER)
    console.print(f"[bold]{' '.join(command)}[/bold]\n(its log: {log_path})")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Other machines have no part in a demo; a user's own choice stays.
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    with log_path.open("w") as log:
        launch = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    monitor = subprocess.Popen(
        [
            *(sys.executable, "-m", "surg_perception.nodes.monitor", "--until-silent"),
            *("--limit-s", str(DURATION_S + 8), "--start-limit-s", str(START_LIMIT_S), "--out", str(out)),
            *("--ask", source, "--phantom-duration-s", str(DURATION_S)),
        ],
        env=environment,
    )
    try:
        while monitor.poll() is None:
            if launch.poll() is not None:
                console.print(f"the launch ended early (exit status {launch.returncode}):", style="red")
                console.print("".join(log_path.read_text().splitlines(keepends=True)[-15:]), markup=False)
                monitor.send_signal(signal.SIGINT)
                monitor.wait(10)
                return 1
            time.sleep(0.1)
    except KeyboardInterrupt:
        monitor.wait(10)
    finally:
        stop(launch)
    if monitor.returncode == 0:
        console.print(f"overlay   {overlay if overlay.exists() else 'was not written: see the log'} (and .mp4)")
        console.print(
            "The model was trained on a procedural phantom: nothing here says how well a phase is known in a person."
        )
    return monitor.returncode


def stop(launch: subprocess.Popen[bytes]) -> None:
    """End the launch and everything it started, politely first."""
    for number, patience_s in ((signal.SIGINT, 10), (signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        if launch.poll() is not None:
            return
        # The whole group, as Ctrl-C does: on SIGINT, launch relies on the terminal having told its nodes too.
        os.killpg(launch.pid, number)
        try:
            launch.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
