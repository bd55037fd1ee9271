"""The stages of a build, in order: plan, illustrate, label, verify, export, card. Each is a pure function of rows."""
