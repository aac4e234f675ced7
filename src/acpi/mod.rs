//! ACPI tables, generated from the device list.
