"""Generated rooms: four walls, furniture along them and in the middle, six ways to look."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from mofo.data.world.furniture import BOLD, PIECES, wooden
from mofo.data.world.raycast import Camera, Light, turn
from mofo.data.world.staging import Draw, Scene, Thing, carpet, mix, panel, placed
from mofo.data.world.textures import Material

SIDES = {"back": np.pi, "left": np.pi / 2, "right": -np.pi / 2, "front": 0.0}
WALLS = ("white", "beige", "blue", "green", "yellow", "pink", "grey", "orange")
ALONG_WALLS = ("sofa", "bed", "shelf", "cabinet", "table", "chair", "lamp", "plant", "none")
IN_THE_MIDDLE = ("table", "table", "chair", "box", "ball", "none")
EXTRA = ("ball", "box", "chair", "none", "none")
ON_WALLS = ("window", "picture", "door", "none")
VIEWS = ("across", "across", "corner", "along", "down", "close", "low")
TRIES = 6
MARGIN = 0.55  # metres between a camera and the walls


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Size of a room around the origin, and what stands in it: x, z, half x, half z, height."""

    width: float
    depth: float
    height: float
    solids: list[Float64[np.ndarray, "5"]]

    def wall(self, yaw: float) -> tuple[float, float]:
        """Length of the wall whose inner side faces `yaw`, and its distance from the origin."""
        across = yaw in (SIDES["back"], SIDES["front"])
        return (self.width, self.depth / 2) if across else (self.depth, self.width / 2)


def compose_room(draw: Draw) -> Scene:
    """A furnished room."""
    plan = Plan(
        width=draw.held(3.0, 7.0), depth=draw.held(3.2, 8.0), height=draw.held(2.4, 3.2), solids=[]
    )

    def propose() -> tuple[str, ...]:
        walls = (draw.pick(ALONG_WALLS) for _ in SIDES)
        return (*walls, draw.pick(IN_THE_MIDDLE), draw.pick(EXTRA))

    scene = Scene(kind="room", arrangement=draw.arrange(propose))
    _add_shell(draw, scene, plan)
    for yaw in SIDES.values():
        _hang(draw, scene, plan, yaw)
    for (slot, yaw), noun in zip(
        [*SIDES.items(), ("middle", None), ("extra", None)], scene.arrangement, strict=True
    ):
        if noun != "none":
            _furnish(draw, scene, plan, noun, yaw, 0.5 if slot == "middle" else 0.8)
    if draw.chance(0.45):
        _add_rug(draw, scene, plan)
    _add_lamps(draw, scene, plan)
    scene.cameras = [_aim(draw, plan) for _ in range(TRIES)]
    return scene


def _floor(draw: Draw) -> tuple[str, Material]:
    pattern = draw.pick(("wood", "wood", "checker", "tiles", "plain"))
    if pattern == "wood":
        # Paler than furniture, which would vanish on its own wood.
        floor = wooden(draw, 0.4, 0.7)
        return "a wooden floor", replace(
            floor, colour=mix(floor.colour, 0.95, 0.14), accent=mix(floor.accent, 1.1, 0.12)
        )
    first = draw.pick(("white", "grey", "beige", "red", "green", "blue", "brown"))
    second = draw.pick([name for name in ("black", "white", "red", "blue") if name != first])
    colour = draw.shade(first)
    if pattern == "checker":
        return "a checkered floor", Material(
            pattern=pattern, colour=colour, accent=draw.shade(second), period=draw.held(0.9, 1.7)
        )
    if pattern == "tiles":
        seam = draw.shade("grey" if first != "grey" else "white")
        return "a tiled floor", Material(
            pattern=pattern, colour=colour, accent=seam, period=draw.held(0.5, 0.9)
        )
    return f"a {first} floor", Material(colour=colour)


def _walls(draw: Draw) -> tuple[str, Material]:
    name = draw.pick(WALLS)
    # Pastel, so that furniture of the same colour stands out.
    wall = Material(colour=mix(draw.shade(name), 0.62, 0.35))
    style = draw.uniform(0.0, 1.0)
    if style < 0.12:
        brick, mortar = mix((0.62, 0.28, 0.2), draw.held(0.85, 1.1)), draw.shade("beige")
        return "brick walls", Material(
            pattern="brick", colour=brick, accent=mortar, period=draw.held(0.5, 0.8)
        )
    if style < 0.24 and name not in ("white", "beige", "grey"):
        return "striped walls", Material(
            pattern="stripes",
            colour=draw.shade("white"),
            accent=wall.colour,
            period=draw.held(0.8, 1.4),
        )
    return f"{name} walls", wall


def _add_shell(draw: Draw, scene: Scene, plan: Plan) -> None:
    floor_phrase, floor = _floor(draw)
    wall_phrase, wall = _walls(draw)
    ceiling = Material(colour=draw.shade("white"))
    scene.shapes += [
        carpet(0.0, 0.0, 0.0, plan.width, plan.depth, floor),
        carpet(0.0, plan.height, 0.0, plan.width, plan.depth, ceiling),
    ]
    for yaw in SIDES.values():
        length, away = plan.wall(yaw)
        upright = panel(0.0, plan.height / 2, -away, length, plan.height, wall)
        scene.shapes.append(placed(upright, yaw, 0.0, 0.0))
    scene.surroundings += [(floor_phrase, {0}), (wall_phrase, {2, 3, 4, 5})]


def _hang(draw: Draw, scene: Scene, plan: Plan, yaw: float) -> None:
    """A window, a picture, a door or nothing on one wall."""
    noun = draw.pick(ON_WALLS)
    if noun == "none":
        return
    length, away = plan.wall(yaw)
    look, middle = draw.pick(BOLD[:7]), 1.55
    if noun == "window":
        look, w, h = "", draw.uniform(1.0, 1.6), draw.uniform(0.9, 1.3)
        sky = mix((0.6, 0.83, 1.0), draw.held(0.85, 1.0))
        surface = Material(pattern="window", colour=sky, accent=draw.shade("white"), glows=True)
    elif noun == "picture":
        w, h = draw.uniform(0.6, 1.2), draw.uniform(0.5, 0.9)
        frame = draw.shade(draw.pick(("white", "brown", "black")))
        surface = Material(pattern="picture", colour=draw.shade(look), accent=frame)
    else:
        look, w, h, middle = draw.pick(("white", "brown", "red", "blue", "green")), 0.9, 2.0, 1.0
        colour = draw.shade(look)
        surface = Material(pattern="panel", colour=colour, accent=mix(colour, 0.6))
    x = draw.uniform(-1.0, 1.0) * (length / 2 - w / 2 - 0.2)
    # A centimetre off the wall, or the two would share their pixels at random.
    scene.add(
        Thing(look=look, noun=noun),
        [placed(panel(x, middle, -away + 0.01, w, h, surface), yaw, 0.0, 0.0)],
    )


def _furnish(
    draw: Draw, scene: Scene, plan: Plan, noun: str, yaw: float | None, reach: float
) -> None:
    """A piece with its back to a wall (without `yaw`: in the middle), where there is room."""
    found = PIECES[noun](draw)
    for _ in range(8):
        if yaw is None:
            angle = draw.uniform(-np.pi, np.pi)
            x = draw.uniform(-reach, reach) * (plan.width / 2 - 0.5)
            z = draw.uniform(-reach, reach) * (plan.depth / 2 - 0.5)
            half = [np.hypot(*found.half)] * 2
        else:
            angle = yaw
            length, away = plan.wall(yaw)
            slide = draw.uniform(-1.0, 1.0) * max(length / 2 - found.half[0] - 0.1, 0.0)
            x, _, z = (turn(yaw) @ (slide, 0, found.half[1] + 0.05 - away)).tolist()
            half = found.half if length == plan.width else found.half[::-1]
        taken = np.array([x, z, *half, found.top])
        inside = abs(x) + half[0] <= plan.width / 2 and abs(z) + half[1] <= plan.depth / 2
        if inside and not any(_overlap(taken, other) for other in plan.solids):
            plan.solids.append(taken)
            scene.add(found.thing, [placed(part, angle, x, z) for part in found.parts])
            return


def _overlap(one: Float64[np.ndarray, "5"], other: Float64[np.ndarray, "5"]) -> bool:
    return bool(np.all(np.abs(one[:2] - other[:2]) < one[2:4] + other[2:4]))


def _add_rug(draw: Draw, scene: Scene, plan: Plan) -> None:
    name = draw.pick(BOLD[:7])
    accent = draw.shade(draw.pick([n for n in ("white", "yellow", "black") if n != name]))
    rug = Material(pattern="border", colour=draw.shade(name), accent=accent)
    w, d = draw.uniform(1.4, 2.2), draw.uniform(1.4, 2.6)
    x, z = (draw.uniform(-0.5, 0.5) * (side / 2 - 0.5) for side in (plan.width, plan.depth))
    scene.add(Thing(look=name, noun="rug"), [carpet(x, 0.01, z, w, d, rug)])


def _add_lamps(draw: Draw, scene: Scene, plan: Plan) -> None:
    warm, count = draw.uniform(0.85, 1.0), 1 if draw.chance(0.6) else 2
    power = draw.uniform(0.5, 0.65) / count
    for _ in range(count):
        x, z = draw.uniform(-0.3, 0.3) * plan.width, draw.uniform(-0.3, 0.3) * plan.depth
        place, reach = (x, plan.height - 0.4, z), draw.uniform(3.0, 5.0)
        colour = (power, power * (0.5 + 0.5 * warm), power * warm)
        scene.lights.append(Light(place=place, colour=colour, reach=reach))
    level = draw.uniform(0.38, 0.48)
    scene.ambient = (level, level, level * 1.03)


def _aim(draw: Draw, plan: Plan) -> Camera:
    view, fov = draw.pick(VIEWS), np.radians(draw.held(45.0, 72.0))
    eye, target = _stand(draw, view, plan)
    for _ in range(20):
        if not any(_blocks(solid, eye) for solid in plan.solids):
            break
        eye, target = _stand(draw, view, plan)
    x, y, z = target - eye
    yaw = np.arctan2(x, z) + draw.held(-0.2, 0.2)
    pitch = np.clip(np.arctan2(y, np.hypot(x, z)) + draw.held(-0.08, 0.08), -0.8, 0.25)
    return Camera(place=tuple(eye.tolist()), yaw=float(yaw), pitch=float(pitch), fov=float(fov))


def _blocks(solid: Float64[np.ndarray, "5"], eye: Float64[np.ndarray, "3"]) -> bool:
    beside = np.abs(eye[[0, 2]] - solid[:2]) < solid[2:4] + 0.45
    return bool(beside.all() and eye[1] < solid[4] + 0.5)


def _stand(
    draw: Draw, view: str, plan: Plan
) -> tuple[Float64[np.ndarray, "3"], Float64[np.ndarray, "3"]]:
    """Where the camera stands and what it looks at."""
    room = np.array([plan.width / 2 - MARGIN, plan.depth / 2 - MARGIN])
    corner = room * (draw.pick((-1, 1)), draw.pick((-1, 1)))
    if view == "across":
        eye = corner * (draw.uniform(0.75, 1.0), draw.uniform(0.75, 1.0))
        target = -0.5 * corner * (draw.uniform(-0.3, 1.0), draw.uniform(-0.3, 1.0))
        levels = draw.held(1.2, 1.8), draw.uniform(0.5, 1.2)
    elif view == "corner":
        eye = room * (draw.uniform(-1.0, 1.0), draw.uniform(-1.0, 1.0))
        target = corner * 1.1
        levels = draw.held(1.0, 1.8), draw.uniform(0.4, 1.3)
    elif view == "along":
        eye = corner
        target = eye * draw.pick(((-1, draw.uniform(0.7, 1.2)), (draw.uniform(0.7, 1.2), -1)))
        levels = draw.held(0.9, 1.6), draw.uniform(0.6, 1.3)
    else:
        solid = draw.pick(plan.solids) if plan.solids else np.array([0, 0, 0.3, 0.3, 0.5])
        angle, target = draw.uniform(-np.pi, np.pi), solid[:2]
        nearest, furthest = {"down": (0.7, 1.6), "close": (1.1, 2.0), "low": (1.2, 3.0)}[view]
        away = draw.uniform(nearest, furthest) + solid[2:4].max()
        eye = np.clip(target + away * np.array([np.sin(angle), np.cos(angle)]), -room, room)
        low, high = {"down": (1.7, plan.height - 0.3), "close": (0.7, 1.5), "low": (0.3, 0.7)}[view]
        levels = draw.held(low, high), solid[4] * draw.uniform(0.3, 0.8)
    return np.insert(eye, 1, levels[0]), np.insert(target, 1, levels[1])
