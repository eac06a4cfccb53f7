"""Patients of the phantom, drawn from published sizes and attenuations of the abdomen.

Mean and standard deviation, sizes in mm, attenuations in HU:

- liver: span of 140 +- 17 in the midclavicular line [1]; 58 +- 9 HU unenhanced [2], enhanced by
  56 +- 14 HU in the portal phase [3]; 1 to 18 HU above the spleen if free of fat [4].
- spleen: length 100 +- 21, width 89 +- 16, thickness 46 +- 8 [5].
- kidneys: length 112 left, 109 right [6]; 104 +- 6 and 106 +- 6 in another population [7].
- aorta: infrarenal 19.3 in men and 16.7 in women, descending thoracic 25.8 and 23.1 [8].
- vertebrae: body of L1 41 wide and 34 deep [9]; trabecular bone of 226 +- 44 HU below 30 years,
  less by 2.5 HU a year, 89 +- 38 HU above 90 [10].
- organ masses of reference man and woman as a check of the volumes [11].

What the sources leave open (shape, place, phase, gut, fat) is set to what abdominal CT looks like.

[1] Kratzer et al., 2003, J Ultrasound Med 22:1155. [2] Int J Legal Med, 2019, 133:1861,
doi:10.1007/s00414-019-02016-1. [3] Naruo et al., 2007, Radiat Med 25:106. [4] Park et al., 2011,
Radiology 258:760. [5] Caglar et al., 2014, Folia Morphol, doi:10.5603/FM.2014.0038. [6] Emamian et
al., 1993, AJR 160:83. [7] Lee, 1996, J Korean Soc Med Ultrasound 15:63. [8] Rogers et al., 2013, Am
J Cardiol 111:1510. [9] Panjabi et al., 1992, Spine 17:299. [10] Jang et al., 2019, Radiology
291:360. [11] ICRP Publication 89, 2002.
"""

from dataclasses import dataclass

import numpy as np

# Mean HU by contrast phase; the standard deviations are those of the patients' draw.
PHASES = {
    "unenhanced": dict(liver=58, spleen=49, cortex=33, medulla=30, aorta=42, vein=40, pancreas=40),
    "arterial": dict(
        liver=72, spleen=125, cortex=185, medulla=85, aorta=300, vein=75, pancreas=110
    ),
    "portal": dict(
        liver=114, spleen=120, cortex=190, medulla=165, aorta=160, vein=155, pancreas=95
    ),
}
PHASE_SHARE = {"unenhanced": 0.15, "arterial": 0.2, "portal": 0.65}


@dataclass(frozen=True)
class Patient:
    """Sizes in mm and attenuations in HU of one drawn patient."""

    trunk: tuple[float, float]  # half axes, lateral and anteroposterior
    fat: float  # subcutaneous, in front
    liver_span: float
    spleen: tuple[float, float, float]  # length, width, thickness
    kidneys: tuple[float, float]  # length of the right and the left
    aorta: float  # diameter below the renal arteries
    vertebra: tuple[float, float]  # width, depth of the body
    shift: dict[str, np.ndarray]  # displacement of each organ
    attenuation: dict[str, float]
    stomach_gas: float  # share of its lumen
    plaques: bool  # in the wall of the aorta
    couch: bool


def draw_patient(random: np.random.Generator) -> Patient:
    """Draws a patient from the distributions above."""

    def draw(mean: float, deviation: float) -> float:
        """Normal, cut at two standard deviations: no patient should be a freak."""
        return mean + deviation * float(np.clip(random.standard_normal(), -2, 2))

    woman = bool(random.random() < 0.5)
    build = draw(0, 1)  # slim to obese; organs grow with it a little [1, 5]
    growth = 1 + 0.03 * build
    age = random.uniform(25, 85)
    phase = random.choice(list(PHASE_SHARE), p=list(PHASE_SHARE.values()))
    means = PHASES[str(phase)]
    enhancement = draw(1, 0.12)
    attenuation = {name: 35 + (mean - 35) * enhancement for name, mean in means.items()}
    attenuation["liver"] += draw(0, 9) - (random.uniform(10, 45) if random.random() < 0.2 else 0)
    attenuation["spleen"] += draw(0, 6)
    attenuation["muscle"] = draw(56, 6)
    attenuation["trabecular"] = 226 - 2.5 * (age - 27) + draw(0, 35)
    organs = ("liver", "spleen", "right kidney", "left kidney", "stomach", "pancreas", "bowel")
    return Patient(
        trunk=(draw(162, 8) + 10 * build - 6 * woman, draw(108, 6) + 9 * build - 4 * woman),
        fat=max(6.0, draw(20, 4) + 7 * build + 4 * woman),
        liver_span=draw(140, 15) * growth,
        spleen=(draw(100, 18) * growth, draw(89, 13), draw(44, 7)),
        kidneys=(draw(108, 7) * growth, draw(111, 7) * growth),
        aorta=draw(16.7 if woman else 19.3, 2),
        vertebra=(draw(39 if woman else 43, 2), draw(31 if woman else 35, 1.5)),
        shift={organ: random.normal(0, (5, 5, 8)).clip(-12, 12) for organ in organs},
        attenuation=attenuation,
        stomach_gas=random.uniform(0, 0.6),
        plaques=bool(random.random() < 0.3),
        couch=bool(random.random() < 0.4),
    )
