# SPDX-License-Identifier: Apache-2.0
"""`ros2 launch` and `ros2 lifecycle` with the arguments of upstream's ros2launch and ros2lifecycle."""
