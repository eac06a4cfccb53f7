"""An abdomen in supine CT: the patient of `anatomy` painted structure by structure, in HU.

The origin is the middle of the trunk at the first lumbar vertebra; x to the patient's right, y
anterior, z superior. Structures are painted from the outside in: later ones cover earlier ones.
"""

import numpy as np

from medmoco.data.anatomy import Patient
from medmoco.data.canvas import Canvas, superellipse

CLASSES = (
    "background",
    "liver",
    "spleen",
    "right kidney",
    "left kidney",
    "stomach",
    "aorta",
    "spine",
)
HEIGHT = 192.0  # mm from the domes of the diaphragm to the lower poles of the kidneys
BOTTOM = -92.0  # mm
AIR, LUNG, FAT, SKIN, GAS, BILE, CALCIUM = -1000.0, -850.0, -105.0, 15.0, -930.0, 10.0, 600.0


def render(
    patient: Patient, random: np.random.Generator, size: int, slices: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Renders a patient as a scanner stores it: x to the left, y to the back, z up (LPS).

    Returns:
        HU (size, size, slices) int16; class indices uint8 of the same shape; affine (4, 4).
    """
    field = 2.2 * max(patient.trunk)
    spacing = np.array([field / size, field / size, HEIGHT / slices])
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = [(field - spacing[0]) / 2, (field - spacing[1]) / 2, BOTTOM + spacing[2] / 2]
    scan = _Abdomen(patient, random, affine, (size, size, slices))
    scan.couch()
    scan.wall()
    scan.bowel()
    scan.colon()
    scan.liver()
    scan.spleen()
    scan.stomach()
    scan.pancreas()
    scan.kidneys()
    scan.muscles()
    scan.spine()
    scan.vessels()
    scan.lungs()
    scan.add_noise(11 + 0.06 * (sum(patient.trunk) - 250))  # the thicker, the fewer photons
    return np.rint(scan.hu).clip(-1024, 3071).astype(np.int16), scan.labels, affine


class _Abdomen(Canvas):
    """The volume while it is painted."""

    def __init__(
        self,
        patient: Patient,
        random: np.random.Generator,
        affine: np.ndarray,
        shape: tuple[int, int, int],
    ):
        super().__init__(random, affine, shape, AIR)
        self.patient = patient
        lateral, front = patient.trunk
        self.spine_y = -front + 0.8 * patient.fat + 62
        self.width, self.depth = lateral - 1.1 * patient.fat - 13, front - patient.fat - 9
        x, y, z = self.straight
        self.taper = 1 + 0.0003 * z
        self.cavity = self.section((self.width, self.depth)) + self.smooth(60, 1.5)
        domes = [
            top - 30 * (((x - middle) / (0.62 * self.width)) ** 2 + (y / (1.1 * self.depth)) ** 2)
            for top, middle in ((108, 0.48 * self.width), (99, -0.48 * self.width))
        ]
        self.diaphragm = z - np.maximum(*domes) + self.smooth(60, 3)

    def section(self, semi: tuple[float, float]) -> np.ndarray:
        """Distance to a trunk of these half axes, which narrows a little downwards."""
        x, y, _ = self.straight
        return superellipse(x / self.taper, y / self.taper, semi, power=2.3)

    def at(self, organ: str, x: float, y: float, z: float) -> np.ndarray:
        """A point by its share of the cavity's half axes and its height, moved as the organ is."""
        return np.array([x * self.width, y * self.depth, z]) + self.patient.shift[organ]

    def organ(self, name: str, distance: np.ndarray, hu: float | np.ndarray) -> np.ndarray:
        """Paints a labelled organ, kept below the diaphragm and within the wall."""
        inside = np.maximum(self.cavity, self.diaphragm) + 2
        distance = np.maximum(distance + self.smooth(25, 1.2), inside)
        self.paint(distance, hu + self.smooth(12, 4), CLASSES.index(name))
        return distance

    def couch(self) -> None:
        """A thin curved shell below some patients."""
        x, y, _ = self.straight
        if self.patient.couch:
            shell = np.abs(y - 0.0006 * x**2 + self.patient.trunk[1] + 9) - 3
            self.paint(np.maximum(shell, np.abs(x) - 190), -300.0)

    def wall(self) -> None:
        """Skin, subcutaneous fat, muscle with ribs in it, and the fat inside."""
        x, y, z = self.straight
        skin = self.section(self.patient.trunk)
        self.paint(skin, SKIN)
        self.paint(skin + 2.5, FAT + self.smooth(40, 5))
        self.paint(self.cavity - 13, self.patient.attenuation["muscle"] + self.smooth(8, 10))
        # Ribs run downwards to the front, so that an axial slice meets several of them.
        rise = 70 * np.arctan2(y, np.abs(x) + 40)
        rib = np.abs((z + rise + 500) % 30 - 15) - 4.5
        margin = -25 + 0.7 * (y + self.depth) - z  # the costal margin rises to the front
        cage = np.maximum.reduce([np.abs(self.cavity - 7) - 3.5, margin, 30 - np.abs(x)])
        self.paint(np.maximum(rib, cage), 300.0)
        self.paint(self.cavity, FAT + self.smooth(25, 6))

    def bowel(self) -> None:
        """Coils of small bowel that fill the front of the lower cavity, with a little gas."""
        semi = (0.72 * self.width, 0.55 * self.depth, 65.0)
        place = self.ellipsoid(self.at("bowel", -0.05, 0.3, -72), semi)
        coils = 8 * (np.abs(self.smooth(30, 1)) - 0.85)
        coils = np.maximum.reduce([coils, place, self.cavity + 5])
        self.paint(coils, 35 + self.smooth(15, 16))
        self.paint(np.maximum(coils + 4, 6 * (1.3 - self.smooth(24, 1))), GAS)

    def colon(self) -> None:
        """Up on the right, across in front, down on the left; stool and gas."""
        path = [
            self.at("bowel", *point)
            for point in (
                (0.74, -0.15, -120),
                (0.76, -0.05, -62),
                (0.4, 0.64, -66),
                (-0.4, 0.68, -52),
                (-0.8, 0.1, 0),
                (-0.8, -0.15, -120),
            )
        ]
        colon = np.maximum(self.tube(path, [25, 22, 19, 18, 15, 15]), self.cavity + 3)
        self.paint(colon, 45.0)
        self.paint(colon + 3, 20 + self.smooth(9, 40))
        self.paint(np.maximum(colon + 3, 8 * (0.7 - self.smooth(35, 1))), GAS)

    def liver(self) -> None:
        """Two lobes below the right dome, with veins in them and the gall bladder beneath."""
        half = self.patient.liver_span / 2
        centre = self.at("liver", 0.52, -0.02, 100 - half)
        right = self.ellipsoid(centre, (0.58 * self.width, 1.02 * self.depth, half + 8), tilt=0.12)
        semi = (0.58 * self.width, 0.42 * self.depth, 44.0)
        left = self.ellipsoid(self.at("liver", 0.0, 0.48, 52), semi, tilt=-0.25)
        blend = 8.0  # rounds the edge where the lobes meet
        lobes = -blend * np.logaddexp(-right / blend, -left / blend)
        hollow = self.ellipsoid(self.at("liver", 0.05, -0.2, -16), (40, 42, 60))
        parenchyma = self.patient.attenuation["liver"]
        liver = self.organ("liver", np.maximum(lobes, -hollow), parenchyma)
        tree = np.hypot(self.smooth(45, 1), self.smooth(45, 1))  # two level sets meet in curves
        veins = np.clip(1.5 - tree / 0.13, 0, 1) * np.clip(-liver / self.pixel - 1, 0, 1)
        self.hu += veins * (self.patient.attenuation["vein"] - parenchyma)
        self.paint(self.ellipsoid(self.at("liver", 0.33, 0.42, -10), (15, 17, 26), tilt=0.4), BILE)

    def spleen(self) -> None:
        """A crescent along the wall, on the left and behind."""
        length, breadth, thickness = self.patient.spleen
        x, y, z = self.bent
        _, dy, dz = self.patient.shift["spleen"]
        angle = np.arctan2(-y / self.depth, -x / self.width) - np.deg2rad(28) - 0.01 * dy
        arc = np.hypot(x, y) * angle
        inwards = np.maximum(-self.cavity, 0) / thickness
        form = (2 * arc / breadth) ** 2 + (2 * (z - 34 - dz) / length) ** 2 + inwards**2
        distance = (np.sqrt(form) - 1) * thickness / 2
        self.organ("spleen", distance, self.patient.attenuation["spleen"])

    def stomach(self) -> None:
        """From the fundus below the left dome forward to the pylorus; gas floats on the fluid."""
        label = CLASSES.index("stomach")
        path = [
            self.at("stomach", *point)
            for point in ((-0.46, -0.08, 72), (-0.45, 0.35, 32), (-0.15, 0.62, -2), (0.17, 0.42, 2))
        ]
        fill = self.random.uniform(0.75, 1.15)
        wall = self.tube(path, [34 * fill, 28 * fill, 20 * fill, 11])
        wall = self.organ("stomach", wall, 60.0)
        food = self.random.uniform(5, 45)
        self.paint(wall + 4, food + self.smooth(9, 0.35 * food), label)
        lumen = self.straight[1][wall < -4]
        if lumen.size:
            level = np.quantile(lumen, 1 - self.patient.stomach_gas)
            self.paint(np.maximum(wall + 4, level - self.straight[1]), GAS, label)

    def pancreas(self) -> None:
        """Head beside the pylorus, tail towards the spleen; not labelled."""
        path = [
            self.at("pancreas", *point)
            for point in ((0.2, 0.2, -16), (-0.06, 0.32, 0), (-0.5, -0.05, 26))
        ]
        surface = self.tube(path, [13, 9, 8]) + self.smooth(10, 1.5)
        self.paint(surface, self.patient.attenuation["pancreas"] + self.smooth(8, 12))

    def kidneys(self) -> None:
        """Cortex, medulla, and a sinus of fat that opens to the middle."""
        cortex, medulla = self.patient.attenuation["cortex"], self.patient.attenuation["medulla"]
        sides = ((1, "right kidney", -32.0), (-1, "left kidney", -18.0))
        for (side, name, height), length in zip(sides, self.patient.kidneys, strict=True):
            half = length / 2
            centre = np.array([side * 58, self.spine_y - 4, height]) + self.patient.shift[name]
            semi = (0.5 * half, 0.54 * half, half)
            body = self.ellipsoid(centre, semi, tilt=side * 0.22, turn=-side * 0.5)
            hilum = centre + np.array([-side * 0.38, 0.2, 0]) * half
            sinus = self.ellipsoid(hilum, (0.34 * half, 0.18 * half, 0.5 * half))
            self.paint(np.maximum(body - 7, self.cavity), FAT)  # its capsule
            pyramids = np.clip(-body / 7 - 0.7 + self.smooth(14, 0.3), 0, 1)
            self.organ(name, np.maximum(body, -sinus), cortex + pyramids * (medulla - cortex))

    def muscles(self) -> None:
        """Psoas, growing downwards beside the spine, and the erector behind it."""
        x, y, z = self.straight
        y = y - self.spine_y
        psoas = np.hypot(np.abs(x) - self.patient.vertebra[0] / 2 - 10, y + 6)
        psoas -= np.clip(13 - 0.12 * z, 3, 24)
        erector = np.hypot((np.abs(x) - 33) / 1.35, y + 44) - 20
        surface = np.maximum(np.minimum(psoas, erector), self.cavity - 11)
        self.paint(surface, self.patient.attenuation["muscle"] + self.smooth(8, 12))

    def spine(self) -> None:
        """Bodies and discs, the arches with their processes, the canal."""
        x, y, z = self.straight
        y = y - self.spine_y
        width, depth = self.patient.vertebra
        label = CLASSES.index("spine")
        pitch, disc = 35.0, 9.0
        level = np.abs((z + 10 * pitch) % pitch - pitch / 2)  # mm from the middle of a vertebra
        in_disc = np.clip((level - (pitch - disc) / 2) / 3 + 0.5, 0, 1)
        behind = y + depth / 2 + 9  # from the middle of the canal
        spinous = np.maximum(np.abs(x) - 4, np.abs(behind + 24) - 13)
        transverse = np.maximum(np.abs(behind + 2) - 4.5, np.abs(np.abs(x) - 22) - 12)
        processes = np.minimum(spinous + 0.6 * level - 5, transverse + 0.8 * level - 4)
        arch = np.minimum(np.abs(np.hypot(x, behind) - 12) - 3, processes)
        self.paint(arch, 300 + self.smooth(8, 40), label)
        body = np.hypot(x * depth / width, y) - depth / 2
        cortex = 260 * np.clip(1 - np.abs(body + 1.5) / 3, 0, 1)
        bone = self.patient.attenuation["trabecular"] + cortex + self.smooth(8, 18)
        self.paint(body, bone + in_disc * (85 - bone), label)
        self.paint(np.hypot(x, behind) - 8.5, 25.0)

    def vessels(self) -> None:
        """The aorta in front of the spine on the left, in some with plaques; the vena cava."""
        x, y, z = self.bent
        front = y - self.spine_y - self.patient.vertebra[1] / 2
        wider = 1 + 0.18 * np.clip((z + 30) / 100, 0, 1)  # above the renal arteries
        radius = self.patient.aorta / 2 * wider
        aorta = np.hypot(x + 9 + 0.03 * z, front - radius - 1) - radius
        label = CLASSES.index("aorta")
        self.paint(aorta, self.patient.attenuation["aorta"] + self.smooth(15, 4), label)
        if self.patient.plaques:
            plaques = np.maximum(np.abs(aorta + 1) - 1.5, 4 * (1.4 - self.smooth(15, 1)))
            self.paint(plaques, CALCIUM, label)
        cava = np.hypot((x - 18) / 1.25, front - 9) - 9
        self.paint(cava, self.patient.attenuation["vein"])

    def lungs(self) -> None:
        """All above the diaphragm but the spine and its muscles."""
        x, y, _ = self.straight
        spine = 36 - np.hypot(x, np.maximum(y - self.spine_y, 0))  # and all behind it
        lung = np.maximum.reduce([-self.diaphragm, self.cavity + 1, spine])
        self.paint(lung, LUNG + self.smooth(12, 25))
