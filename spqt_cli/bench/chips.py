"""Memory bandwidth of Apple's chips, as published: of the largest GPU sold under each name."""

GB_PER_S = {
    "M1": 68.3, "M1 Pro": 204.8, "M1 Max": 409.6, "M1 Ultra": 819.2,
    "M2": 102.4, "M2 Pro": 204.8, "M2 Max": 409.6, "M2 Ultra": 819.2,
    "M3": 102.4, "M3 Pro": 153.6, "M3 Max": 409.6, "M3 Ultra": 819.2,
    "M4": 120.0, "M4 Pro": 273.1, "M4 Max": 546.1,
}  # fmt: skip
