# SPDX-License-Identifier: Apache-2.0
"""Names of the field, each stated once: phases, tools, instruments, verbs and targets of the public data sets.

Sources: Twinanda et al., EndoNet (Cholec80 and M2CAI16-workflow, arXiv 1602.03012); Nwoye et al., Rendezvous
(CholecT50, arXiv 2109.03223); Wang et al., AutoLaparo (arXiv 2208.02049). The order is that of the
data sets, so an index here is a label there.
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

CHOLEC80_TOOLS = ("Grasper", "Bipolar", "Hook", "Scissors", "Clipper", "Irrigator", "SpecimenBag")

M2CAI16_PHASES = ("TrocarPlacement", *CHOLEC80_PHASES)

AUTOLAPARO_PHASES = (
    "Preparation",
    "Dividing Ligament and Peritoneum",
    "Dividing Uterine Vessels and Ligament",
    "Transecting the Vagina",
    "Specimen Removal",
    "Suturing",
    "Washing",
)

LABEL_SETS = {"cholec80": CHOLEC80_PHASES, "m2cai16": M2CAI16_PHASES, "autolaparo": AUTOLAPARO_PHASES}

PHASE_ALIASES = {
    "carlottriangledissection": "calottriangledissection",
    "clippingandcutting": "clippingcutting",
    "cleaningandcoagulation": "cleaningcoagulation",
    "gallbladderextraction": "gallbladderretraction",
}
"""Other spellings of phases in circulation, both sides in lower case with letters and digits only."""

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

PROCEDURES = (
    "Appendectomy",
    "Cholecystectomy",
    "Colectomy",
    "Gastrectomy",
    "Hernia Repair",
    "Esophagectomy",
    "Colostomy",
    "Hemicolectomy",
    "Hepatectomy",
    "Splenectomy",
)
"""The ten of GSViT's procedure fine-tuning, whose models are named `GSViT-<Procedure>`."""
