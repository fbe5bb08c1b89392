# SPDX-License-Identifier: Apache-2.0
"""Names of the field, each stated once: Cholec80's phases, CholecT50's instruments, verbs and targets.

Sources: Twinanda et al., EndoNet (Cholec80, arXiv 1602.03012); Nwoye et al., Rendezvous (CholecT50,
arXiv 2109.03223). The order is that of the data sets, so an index here is a label there.
"""

CHOLEC80_PHASES = (
    "Preparation",
    "CalotTriangleDissection",
    "ClippingCutting",
    "GallbladderDissection",
    "GallbladderPackaging",
    "CleaningCoagulation",
    "GallbladderRetraction",
)

CHOLECT50_INSTRUMENTS = ("grasper", "bipolar", "hook", "scissors", "clipper", "irrigator")

CHOLECT50_VERBS = (
    "grasp",
    "retract",
    "dissect",
    "coagulate",
    "clip",
    "cut",
    "aspirate",
    "irrigate",
    "pack",
    "null_verb",
)

CHOLECT50_TARGETS = (
    "gallbladder",
    "cystic_plate",
    "cystic_duct",
    "cystic_artery",
    "cystic_pedicle",
    "blood_vessel",
    "fluid",
    "abdominal_wall_cavity",
    "liver",
    "adhesion",
    "omentum",
    "peritoneum",
    "gut",
    "specimen_bag",
    "null_target",
)
