"""Builds a folder that stands in for Isaac Lab's asset server, from the robots that the newton package carries.

    python tests/isaaclab_assets_offline.py FOLDER && export ISAACSIM_ASSET_ROOT=FOLDER

With it the stock Isaac-Cartpole-Direct, Isaac-Cartpole, Isaac-Ant, Isaac-Ant-Direct and Isaac-Humanoid run without a network.
"""

import sys
from pathlib import Path

import newton
from pxr import Sdf, Usd, UsdGeom, UsdLux, UsdPhysics, UsdShade

SOURCES = Path(newton.__file__).parent / "examples" / "assets"
ROBOTS = {  # source: path in the asset root, root prim, joints by another name
    "cartpole_single_pendulum.usda": ("Isaac/IsaacLab/Robots/Classic/Cartpole/cartpole.usd", "/cartpole", {}),
    "ant.usda": ("Isaac/Robots/IsaacSim/Ant/ant_instanceable.usd", "/ant", {}),
    "humanoid.usda": (
        "Isaac/Robots/IsaacSim/Humanoid/humanoid_instanceable.usd",
        "/nv_humanoid",
        {"abdomen_x": "pelvis", "left_elbow": "left_lower_arm", "right_elbow": "right_lower_arm",
         "left_knee": "left_shin", "right_knee": "right_shin"},
    ),
}  # fmt: skip
GROUND = "Isaac/IsaacLab/Environments/Grid/default_ground_plane_checker_v1/default_ground_plane.usda"


def write_robot(source, path, root, joints):
    stage = Usd.Stage.Open(str(SOURCES / source), Usd.Stage.LoadAll)
    layer = stage.Flatten()
    stage = Usd.Stage.Open(layer)
    # Groups of shapes that may collide: the humanoid's leave out the ground, through which Newton would let it fall.
    kinds = UsdPhysics.Scene, UsdPhysics.CollisionGroup, UsdLux.BoundableLightBase, UsdLux.NonboundableLightBase
    unwanted = [prim.GetPath() for prim in stage.Traverse() if any(prim.IsA(kind) for kind in kinds)]
    for prim_path in unwanted:
        stage.RemovePrim(prim_path)
    renamed = [prim.GetPath() for prim in stage.Traverse() if prim.GetName() in joints and prim.IsA(UsdPhysics.Joint)]
    edit = Sdf.BatchNamespaceEdit()
    for prim_path in renamed:
        edit.Add(prim_path, prim_path.ReplaceName(joints[prim_path.name]))
    assert layer.Apply(edit)
    stage.SetDefaultPrim(stage.GetPrimAtPath(root))
    path.parent.mkdir(parents=True, exist_ok=True)
    layer.Export(str(path))


def write_ground(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = Usd.Stage.CreateNew(str(path))
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.z)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    world = UsdGeom.Xform.Define(stage, "/World")
    plane = UsdGeom.Plane.Define(stage, "/World/CollisionPlane")
    plane.CreateAxisAttr("Z")
    UsdPhysics.CollisionAPI.Apply(plane.GetPrim())
    UsdShade.Material.Define(stage, "/World/Looks/theGrid")
    UsdShade.Shader.Define(stage, "/World/Looks/theGrid/Shader")
    stage.SetDefaultPrim(world.GetPrim())
    stage.Save()


def build(folder):
    """Writes what is not there yet; returns the folder."""
    folder = Path(folder)
    for source, (path, root, joints) in ROBOTS.items():
        if not (folder / path).exists():
            write_robot(source, folder / path, root, joints)
    if not (folder / GROUND).exists():
        write_ground(folder / GROUND)
    return folder


if __name__ == "__main__":
    print(build(sys.argv[1]))
