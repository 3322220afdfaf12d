"""What devices have, in nominal figures: memory that an app may take, and how fast it is read.

Nothing here was measured by edgedistill.  Bandwidth is arithmetic on the memory interface,
transfers per second times the bits of the bus; programs reach a part of it, and heat takes more.

Memory interfaces:

- A14 and A15 have LPDDR4X-4266, A16 and A17 Pro LPDDR5-6400, each on 64 bits (Wikipedia, "Apple
  silicon", A series): 34.1 and 51.2 GB/s.  Apple gives the A18 17% more than that (iPhone 16
  announcement, September 2024): LPDDR5X-7500.
- Snapdragon 8 Gen 3: LPDDR5X at 4,800 MHz on 4 x 16 bits (Qualcomm's product brief).  Google
  Tensor: LPDDR5 at 3,200 MHz on 4 x 16 bits (AnandTech, "Google's Tensor inside of Pixel 6", 2021).
  Snapdragon 695, for phones of the lower middle: LPDDR4X at 2,133 MHz on 2 x 16 bits (Qualcomm's
  product brief).
- Raspberry Pi 5: LPDDR4X-4267 on 32 bits (raspberrypi.com, "Introducing: Raspberry Pi 5!").
- Laptop: DDR5-5600 on two channels of 64 bits, as of 2023's mobile processors.

Memory of an app: iOS ends an app at a limit that Apple does not publish.  Reported by
``os_proc_available_memory``, without the entitlement ``increased-memory-limit`` and with it: 2.1
and 2.4 GB on an iPhone 12 mini (github.com/allenai/OLMoE.swift/pull/38), 3.1 and 4.2 GB on an
iPhone 13 Pro (github.com/a-ghorbani/pocketpal-ai/pull/651), 3 and 6 GB on an iPhone 15 Pro
(github.com/introlab/rtabmap/pull/1446); the iPhone 16, with as much memory, is taken to be alike.
Android has no such limit on native memory, but ends whoever leaves others too little: half of the
memory is our own rule, of the laptop too.  The Raspberry Pi keeps 1 GB for its system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgedistill.errors import UsageError
from edgedistill.plugins import did_you_mean


@dataclass(frozen=True)
class Device:
    """Nominal facts of a device.

    Attributes:
        name: of the device, as a recipe's target may be called.
        memory: its kind, for people.
        ram_gb: that it has, in 10^9 bytes as they are sold.
        app_ram_mb: that an app may take without asking for more, in 10^6 bytes.
        transfers_per_us: of the memory interface: the number in a name such as LPDDR5-6400.
        bus_bits: that move in a transfer.
        formats: that run there, the one to take first.
    """

    name: str
    memory: str
    ram_gb: int
    app_ram_mb: int
    transfers_per_us: int
    bus_bits: int
    formats: tuple[str, ...]

    @property
    def bandwidth_gb_per_s(self) -> float:
        """Of memory, as the interface allows, in 10^9 bytes."""
        return self.transfers_per_us * self.bus_bits / 8 / 1000


_APPLE, _OTHERS = ("coreml", "gguf"), ("gguf", "onnx")

DEVICES = (
    Device("iphone-12", "LPDDR4X-4266", 4, 2100, 4266, 64, _APPLE),
    Device("iphone-13-pro", "LPDDR4X-4266", 6, 3100, 4266, 64, _APPLE),
    Device("iphone-15-pro", "LPDDR5-6400", 8, 3000, 6400, 64, _APPLE),
    Device("iphone-16", "LPDDR5X-7500", 8, 3000, 7500, 64, _APPLE),
    Device("android-4gb", "LPDDR4X-4266", 4, 2000, 4266, 32, _OTHERS),
    Device("pixel-6a", "LPDDR5-6400", 6, 3000, 6400, 64, _OTHERS),
    Device("galaxy-s24", "LPDDR5X-9600", 8, 4000, 9600, 64, _OTHERS),
    Device("raspberry-pi-5", "LPDDR4X-4267", 8, 7000, 4267, 32, _OTHERS),
    Device("laptop", "DDR5-5600", 16, 8000, 5600, 128, _OTHERS),
)


def find_devices(names: Sequence[str]) -> tuple[Device, ...]:
    """The devices of these names, each once; all that are known where none is named.

    Raises:
        UsageError: there is no such device; the hint names near ones.
    """
    known = {device.name: device for device in DEVICES}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, list(known), "known")
            raise UsageError(f"--device {name}: there are no facts of it", hint=hint)
    return tuple(known[name] for name in dict.fromkeys(names)) or DEVICES
