# SPDX-License-Identifier: Apache-2.0
"""`ros2 lifecycle nodes | get NODE | list NODE | set NODE TRANSITION`."""

from __future__ import annotations

import argparse
from typing import Any

import rclpy
from lifecycle_msgs.srv import ChangeState, GetAvailableTransitions, GetState
from ros2cli.command import CommandExtension
from ros2cli.node.direct import DirectNode
from ros2cli.node.strategy import NodeStrategy, add_arguments

ANSWER_WITHIN_S = 10.0


def lifecycle_nodes(node: Any) -> list[str]:
    """Full names of the nodes that offer lifecycle_msgs/srv/GetState as ~/get_state."""
    return sorted(
        name[: -len("/get_state")]
        for name, types in node.get_service_names_and_types()
        if name.endswith("/get_state") and "lifecycle_msgs/srv/GetState" in types
    )


def _call(node: Any, type_: Any, service: str, request: Any) -> Any:
    client = node.create_client(type_, service)
    try:
        if not client.wait_for_service(timeout_sec=ANSWER_WITHIN_S):
            raise RuntimeError(f"no service '{service}' within {ANSWER_WITHIN_S:g} s: is this a lifecycle node?")
        future = client.call_async(request)
        rclpy.spin_until_future_complete(node, future, timeout_sec=6 * ANSWER_WITHIN_S)
        if not future.done():
            raise RuntimeError(f"service '{service}' did not answer within {6 * ANSWER_WITHIN_S:g} s")
        return future.result()
    finally:
        node.destroy_client(client)


class LifecycleCommand(CommandExtension):
    """Show and change the states of lifecycle nodes."""

    def add_arguments(self, parser: argparse.ArgumentParser, cli_name: str) -> None:
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="nodes|get|list|set")
        add_arguments(verbs.add_parser("nodes", help="list the lifecycle nodes"))
        for verb, text in (
            ("get", "show the state of a node"),
            ("list", "list the transitions a node can make now"),
            ("set", "trigger a transition"),
        ):
            verb_parser = verbs.add_parser(verb, help=text)
            add_arguments(verb_parser)
            verb_parser.add_argument("node_name", help="full name, for example /surg_perception/phase")
            if verb == "set":
                verb_parser.add_argument("transition", help="for example configure, activate, or an id")

    def main(self, *, parser: argparse.ArgumentParser, args: argparse.Namespace) -> int | str:
        if args.verb == "nodes":
            with NodeStrategy(args) as node:
                print("\n".join(lifecycle_nodes(node)))
            return 0
        name = args.node_name if args.node_name.startswith("/") else f"/{args.node_name}"
        with DirectNode(args) as direct:
            node = direct.node
            if args.verb == "get":
                state = _call(node, GetState, f"{name}/get_state", GetState.Request()).current_state
                print(f"{state.label} [{state.id}]")
                return 0
            transitions = _call(
                node,
                GetAvailableTransitions,
                f"{name}/get_available_transitions",
                GetAvailableTransitions.Request(),
            ).available_transitions
            if args.verb == "list":
                for each in transitions:
                    print(f"- {each.transition.label} [{each.transition.id}]")
                    print(f"\tStart: {each.start_state.label}\n\tGoal: {each.goal_state.label}")
                return 0
            possible = [each.transition for each in transitions]
            chosen = [t for t in possible if args.transition in (t.label, str(t.id))]
            if not chosen:
                known = ", ".join(t.label for t in possible)
                return f"'{args.transition}' is not possible now; possible: {known}"
            request = ChangeState.Request(transition=chosen[0])
            if not _call(node, ChangeState, f"{name}/change_state", request).success:
                return "Transitioning failed"
            print("Transitioning successful")
            return 0
