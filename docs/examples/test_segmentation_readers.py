"""Every format gives the array and the spacing that were put into it, and refuses what it cannot say."""

import struct
import zlib

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from files_for_tests import COLOURS, PLANE, VOLUME, ome_zarr, saved, space
from PIL import Image
from segmentation.readers import FileError, orientation_of, read_image, read_labels, spatial_dims_of

pytestmark = pytest.mark.training


class TestPictures:
    @pytest.mark.parametrize("array", [PLANE, PLANE.astype(np.uint8), PLANE > 30000])
    def test_grey(self, tmp_path, array):
        image, spacing = read_image(saved(tmp_path / "a.png", array), 2)
        assert np.array_equal(image, array[None])
        assert spacing is None

    def test_colours_are_channels(self, tmp_path):
        image, _ = read_image(saved(tmp_path / "a.png", COLOURS), 2)
        assert np.array_equal(image, COLOURS.transpose(2, 0, 1))
        assert image.dtype == np.uint8

    @pytest.mark.parametrize("channels", [1, 3])
    def test_opacity_is_no_channel(self, tmp_path, channels):
        opaque = np.full((9, 13, 1), 255, np.uint8)
        path = saved(tmp_path / "a.png", np.concatenate([COLOURS[..., :channels], opaque], -1))
        assert np.array_equal(read_image(path, 2).array, COLOURS[..., :channels].transpose(2, 0, 1))

    def test_opacity_that_hides_something(self, tmp_path):
        path = saved(tmp_path / "a.png", np.concatenate([COLOURS, COLOURS[..., :1]], -1))
        with pytest.raises(
            FileError, match=r"a\.png: expected a picture without transparent parts; found opacity from"
        ):
            read_image(path, 2)

    def test_palette(self, tmp_path):
        """Indices are labels, colours are the picture."""
        indices = np.arange(9 * 13, dtype=np.uint8).reshape(9, 13) % 3
        picture = Image.fromarray(indices)
        picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        picture.save(tmp_path / "a.png")
        assert np.array_equal(read_labels(tmp_path / "a.png", 2).array, indices)
        assert np.array_equal(read_image(tmp_path / "a.png", 2).array, 255 * (indices == np.arange(3)[:, None, None]))

    def test_jpeg_holds_images_but_no_labels(self, tmp_path):
        path = saved(tmp_path / "a.jpg", COLOURS)
        assert read_image(path, 2).array.shape == (3, 9, 13)
        with pytest.raises(FileError, match=r"expected labels in a format that keeps values .*; found JPEG"):
            read_labels(path, 2)

    def test_sixteen_bits_of_colour_would_be_halved(self, tmp_path):
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        rows = zlib.compress(b"".join(b"\0" + bytes(4 * 6) for _ in range(4)))
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
        with pytest.raises(FileError, match="expected 8 bits per channel"):
            read_image(tmp_path / "a.png", 2)


class TestTiff:
    @pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
    @pytest.mark.parametrize("byteorder", ["<", ">"])
    def test_plane(self, tmp_path, compression, byteorder):
        path = saved(tmp_path / "a.tif", PLANE, compression=compression, byteorder=byteorder)
        image, spacing = read_image(path, 2)
        assert np.array_equal(image, PLANE[None])
        assert image.dtype == np.uint16
        assert image.dtype.isnative
        assert spacing is None

    def test_dots_per_inch_are_no_spacing(self, tmp_path):
        path = saved(tmp_path / "a.tif", PLANE, resolution=(72, 72), resolutionunit="INCH")
        assert read_image(path, 2).spacing is None

    def test_a_nameless_stack_is_a_volume_or_channels(self, tmp_path):
        path = saved(tmp_path / "a.tif", VOLUME)
        assert np.array_equal(read_image(path, 3).array, VOLUME[None])
        assert np.array_equal(read_image(path, 2).array, VOLUME)

    def test_colours_and_opacity(self, tmp_path):
        assert np.array_equal(read_image(saved(tmp_path / "a.tif", COLOURS), 2).array, COLOURS.transpose(2, 0, 1))
        opaque = np.concatenate([COLOURS, np.full((9, 13, 1), 255, np.uint8)], -1)
        path = saved(tmp_path / "b.tif", opaque, photometric="rgb", extrasamples=["unassalpha"])
        assert np.array_equal(read_image(path, 2).array, COLOURS.transpose(2, 0, 1))

    @pytest.mark.parametrize(
        ("unit", "expected"),
        [
            (None, 0.25),
            ("µm", 0.25),
            ("nm", 0.25e-3),
            ("mm", 250.0),
            ("Å", 0.25e-4),
            ("pixel", None),
            ("reference frame", None),
        ],
    )
    def test_ome_says_its_spacing(self, tmp_path, unit, expected):
        metadata = {"axes": "ZYX"}
        for axis, size in zip("ZYX", (1.0, 0.5, 0.25), strict=True):
            metadata |= {f"PhysicalSize{axis}": size} | ({f"PhysicalSize{axis}Unit": unit} if unit else {})
        path = saved(tmp_path / "a.ome.tif", VOLUME, metadata=metadata)
        image, spacing = read_image(path, 3)
        assert np.array_equal(image, VOLUME[None])
        assert spacing == (None if expected is None else pytest.approx((4 * expected, 2 * expected, expected)))

    def test_ome_with_a_spacing_missing_along_one_axis(self, tmp_path):
        path = saved(
            tmp_path / "a.ome.tif", VOLUME, metadata={"axes": "ZYX", "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.5}
        )
        assert read_image(path, 3).spacing is None

    def test_ome_channels_are_not_planes(self, tmp_path):
        stack = np.stack([VOLUME, VOLUME + 1])
        metadata = {"axes": "CZYX", "PhysicalSizeX": 0.1, "PhysicalSizeY": 0.1, "PhysicalSizeZ": 0.3}
        path = saved(tmp_path / "a.ome.tif", stack, metadata=metadata)
        image, spacing = read_image(path, 3)
        assert np.array_equal(image, stack)
        assert spacing == (0.3, 0.1, 0.1)
        path = saved(tmp_path / "b.ome.tif", VOLUME, metadata={"axes": "CYX"})
        with pytest.raises(FileError, match=r"expected 3 axes of space; found C 5, Y 9, X 13"):
            read_image(path, 3)
        assert read_image(path, 2).array.shape == (5, 9, 13)

    @pytest.mark.parametrize(
        ("unit", "factor"), [("um", 1), ("micron", 1), ("\\u00B5m", 1), ("nm", 1e-3), ("pixel", None), ("inch", None)]
    )
    def test_imagej(self, tmp_path, unit, factor):
        metadata = {"axes": "ZYX", "spacing": 2.0, "unit": unit}
        path = saved(tmp_path / "a.tif", VOLUME, imagej=True, resolution=(4, 2), metadata=metadata)
        image, spacing = read_image(path, 3)
        assert np.array_equal(image, VOLUME[None])
        assert spacing == (None if factor is None else pytest.approx((2 * factor, 0.5 * factor, 0.25 * factor)))

    @pytest.mark.parametrize("keywords", [{"imagej": True}, {"ome": True}])
    def test_time_is_refused_by_name(self, tmp_path, keywords):
        path = saved(tmp_path / "a.tif", VOLUME, metadata={"axes": "TYX"}, **keywords)
        with pytest.raises(FileError, match=r"expected one point in time, .*; found 5 of them along axis 'T'"):
            read_image(path, 2)

    def test_a_single_point_in_time_is_no_axis(self, tmp_path):
        path = saved(tmp_path / "a.ome.tif", VOLUME[None], metadata={"axes": "TZYX"})
        assert read_image(path, 3).array.shape == (1, 5, 9, 13)

    def test_a_part_that_lies_in_another_file(self, tmp_path):
        """OME-TIFF may spread one image over files; where one is missing, tifffile gives zeros."""
        saved(tmp_path / "a.ome.tif", VOLUME, metadata={"axes": "ZYX"})
        with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
            xml = tiff.ome_metadata
        here = '<TiffData IFD="0" PlaneCount="1"/>'
        elsewhere = '<TiffData FirstZ="1" PlaneCount="1"><UUID FileName="b.ome.tif">urn:uuid:0</UUID></TiffData>'
        xml = xml.replace('<TiffData IFD="0" PlaneCount="5"/>', here + elsewhere)
        tifffile.imwrite(tmp_path / "a.ome.tif", VOLUME[0], description=xml.encode(), metadata=None)
        with pytest.raises(FileError, match=r"a\.ome\.tif: expected a complete TIFF file; found .*Missing data"):
            read_image(tmp_path / "a.ome.tif", 3)

    def test_several_images_in_one_file(self, tmp_path):
        with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
            for rows in (9, 8):
                tiff.write(PLANE[:rows], metadata=None)
        with pytest.raises(FileError, match="expected one image; found 2 of sizes 9 x 13, 8 x 13"):
            read_image(tmp_path / "a.tif", 2)


class TestNifti:
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize(("unit", "factor"), [("mm", 1), (None, 1), ("micron", 1e-3), ("meter", 1e3)])
    def test_axes_and_spacing_are_x_y_z(self, tmp_path, suffix, unit, factor):
        image = nibabel.Nifti1Image(VOLUME, np.diag([0.1, 0.7, 17.5, 1]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / f"a{suffix}")
        array, spacing = read_image(tmp_path / f"a{suffix}", 3)
        assert np.array_equal(array, VOLUME[None])
        assert spacing == pytest.approx((0.1 * factor, 0.7 * factor, 17.5 * factor), rel=1e-12)

    def test_scaled_values(self, tmp_path):
        image = nibabel.Nifti1Image(VOLUME.astype(np.int16), np.eye(4))
        image.header.set_slope_inter(0.5, 10)
        nibabel.save(image, tmp_path / "a.nii")
        assert np.allclose(read_image(tmp_path / "a.nii", 3).array[0], VOLUME.astype(np.int16) * 0.5 + 10)

    def test_a_single_slice_is_a_plane(self, tmp_path):
        path = saved(tmp_path / "a.nii", VOLUME[..., :1])
        assert np.array_equal(read_image(path, 2).array, VOLUME[None, ..., 0])
        assert read_image(path, 3).array.shape == (1, 5, 9, 1)

    def test_fourth_axis_is_time_if_the_header_says_so(self, tmp_path):
        stack = np.stack([VOLUME, VOLUME + 1], -1)
        image = nibabel.Nifti1Image(stack, np.eye(4))
        image.header.set_xyzt_units("mm", "sec")
        nibabel.save(image, tmp_path / "a.nii")
        with pytest.raises(FileError, match="expected one point in time"):
            read_image(tmp_path / "a.nii", 3)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, tmp_path / "b.nii")
        assert np.array_equal(read_image(tmp_path / "b.nii", 3).array, [VOLUME, VOLUME + 1])

    def test_orientation(self, tmp_path):
        nibabel.save(nibabel.Nifti1Image(VOLUME, np.diag([-1, 1, 1, 1])), tmp_path / "a.nii.gz")
        assert orientation_of(tmp_path / "a.nii.gz") == "LAS"
        assert orientation_of(tmp_path / "a.tif") is None


class TestZarr:
    @pytest.mark.parametrize("version", ["0.4", "0.5"])
    @pytest.mark.parametrize("suffix", [".zarr", ".ome.zarr"])
    def test_finest_resolution_and_its_scale(self, tmp_path, version, suffix):
        axes = [{"name": "c", "type": "channel"}, *space("zyx", unit="micrometer")]
        stack = np.stack([VOLUME, VOLUME + 1])
        path = ome_zarr(tmp_path / f"a{suffix}", stack, axes, [1, 2.0, 0.5, 0.25], version=version, outer=2.0)
        image, spacing = read_image(path, 3)
        assert np.array_equal(image, stack)
        assert spacing == (4.0, 1.0, 0.5)

    @pytest.mark.parametrize(
        ("unit", "scale", "spacing"),
        [
            ("nanometer", [500, 250], (0.5, 0.25)),
            ("parsec", [500, 250], None),
            (None, [0.5, 0.25], (0.5, 0.25)),
            (None, [1, 1], None),
            ("micrometer", [1, 1], (1.0, 1.0)),
        ],
    )
    def test_units(self, tmp_path, unit, scale, spacing):
        path = ome_zarr(tmp_path / "a.zarr", PLANE, space("yx", **({"unit": unit} if unit else {})), scale)
        assert read_image(path, 2).spacing == spacing

    def test_time_is_refused_unless_single(self, tmp_path):
        axes = [{"name": "t", "type": "time"}, *space("yx", unit="micrometer")]
        assert read_image(ome_zarr(tmp_path / "a.zarr", PLANE[None], axes, [1, 1, 2]), 2).spacing == (1.0, 2.0)
        path = ome_zarr(tmp_path / "b.zarr", VOLUME, axes, [1, 1, 2])
        with pytest.raises(FileError, match=r"b\.zarr: expected one point in time.* found 5 of them along axis 't'"):
            read_image(path, 2)

    def test_plain_array(self, tmp_path):
        zarr.create_array(tmp_path / "a.zarr", data=VOLUME)
        assert np.array_equal(read_image(tmp_path / "a.zarr", 3).array, VOLUME[None])
        zarr.create_array(tmp_path / "b.zarr", data=VOLUME, dimension_names=("c", "y", "x"))
        with pytest.raises(FileError, match="expected 3 axes of space; found c 5, y 9, x 13"):
            read_image(tmp_path / "b.zarr", 3)

    def test_a_group_without_an_image(self, tmp_path):
        zarr.create_group(tmp_path / "a.zarr", attributes={"plate": {}})
        with pytest.raises(FileError, match=r"expected an image in OME-Zarr 0\.4 or 0\.5 .*; found attributes \['pl"):
            read_image(tmp_path / "a.zarr", 2)

    def test_damaged_chunk(self, tmp_path):
        path = ome_zarr(tmp_path / "a.zarr", PLANE, space("yx"), [1, 1])
        (chunk,) = [p for p in (path / "0" / "c").rglob("*") if p.is_file()]
        chunk.write_bytes(chunk.read_bytes()[:20])
        with pytest.raises(FileError, match="expected a complete Zarr file"):
            read_image(path, 2)


class TestLabels:
    def test_whole_floats_are_integers(self, tmp_path):
        path = saved(tmp_path / "a.tif", (PLANE % 3).astype(np.float32))
        labels, _ = read_labels(path, 2)
        assert labels.dtype.kind == "i"
        assert np.array_equal(labels, PLANE % 3)

    @pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (np.nan, "nan"), (np.inf, "inf")])
    def test_fractions(self, tmp_path, value, shown):
        labels = (PLANE % 3).astype(np.float32)
        labels[0, :2] = value
        with pytest.raises(FileError, match=f"expected labels that are whole numbers; found 2 .* such as {shown}"):
            read_labels(saved(tmp_path / "a.tif", labels), 2)

    def test_colours_are_no_labels(self, tmp_path):
        with pytest.raises(FileError, match=r"expected labels, .*; found 3 channels that differ \(117 colours\)"):
            read_labels(saved(tmp_path / "a.png", COLOURS), 2)

    def test_equal_channels_are_one(self, tmp_path):
        path = saved(tmp_path / "a.png", COLOURS[..., :1].repeat(3, -1))
        assert np.array_equal(read_labels(path, 2).array, COLOURS[..., 0])

    @pytest.mark.parametrize(("array", "dims"), [(PLANE, 2), (VOLUME, 3), (VOLUME[:1], 2)])
    def test_number_of_axes(self, tmp_path, array, dims):
        assert spatial_dims_of(saved(tmp_path / "a.tif", array)) == dims
        assert spatial_dims_of(saved(tmp_path / "a.nii.gz", array.T)) == dims

    def test_colours_do_not_count_as_axes(self, tmp_path):
        assert spatial_dims_of(saved(tmp_path / "a.png", COLOURS)) == 2

    def test_one_axis_is_not_enough(self, tmp_path):
        with pytest.raises(FileError, match="expected labels with 2 or 3 axes of space; found y 1, x 13"):
            spatial_dims_of(saved(tmp_path / "a.png", COLOURS[:1, :, 0]))
