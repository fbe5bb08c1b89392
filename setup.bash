# SPDX-License-Identifier: Apache-2.0
# Source this file (bash or zsh) to use ros2 and surg-perception from this checkout after `make setup`.
# It sources colcon's install/setup file, which brings the ROS 2 it was built with and .venv/bin.
_surg_root="$(cd "$(dirname "${BASH_SOURCE[0]:-${(%):-%x}}")" >/dev/null && pwd)"
_surg_shell=bash
[ -z "${ZSH_VERSION:-}" ] || _surg_shell=zsh
if [ -f "$_surg_root/install/setup.$_surg_shell" ] && [ -f "$_surg_root/.venv/local_setup.$_surg_shell" ]; then
  # ROS setup files use variables that are not set.
  case "$-" in
    *u*) set +u; . "$_surg_root/install/setup.$_surg_shell"; set -u ;;
    *) . "$_surg_root/install/setup.$_surg_shell" ;;
  esac
  unset _surg_root _surg_shell
else
  echo "$_surg_root is not set up yet: run 'make -C $_surg_root setup' first" >&2
  unset _surg_root _surg_shell
  return 1
fi
